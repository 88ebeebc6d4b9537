// A walk from class to class with one latent (Figure 8), and the map of one entity along it.

import { work } from "./api.js";
import { bitmapOf, el, framed, part, pngUrl, save, saveJson, seconds, toast } from "./dom.js";
import { Maps, drawImage, drawMap } from "./maps.js";
import { dice, modelOf } from "./models.js";

export function initMorph(panel) {
  const form = panel.querySelector("form");
  const { model, add, seed, steps } = form.elements;
  const strip = part(panel, "strip");
  const slide = part(panel, "slide");
  const entity = part(panel, "entity");
  let classes = []; // numbers, in their order
  let walk = null;
  let timer = 0;

  model.addEventListener("change", () => {
    const names = modelOf(model.value)?.classes ?? [];
    add.replaceChildren(...names.map((name, number) => el("option", { value: String(number) }, name)));
    classes = names.map((_, number) => String(number)).slice(0, 3);
    if (names.length > 3) add.value = "3";
    drawStrip();
  });
  const move = (from, to) => { classes.splice(to, 0, ...classes.splice(from, 1)); drawStrip(); };
  function drawStrip() {
    const names = modelOf(model.value)?.classes ?? [];
    strip.replaceChildren(...classes.map((label, at) => el("li", {}, el("span", {}, names[label]),
      el("button", { type: "button", "aria-label": `Move ${names[label]} up`, disabled: !at, onclick: () => move(at, at - 1) }, "↑"),
      el("button", { type: "button", "aria-label": `Move ${names[label]} down`, disabled: at === classes.length - 1, onclick: () => move(at, at + 1) }, "↓"),
      el("button", { type: "button", "aria-label": `Remove ${names[label]}`, onclick: () => { classes.splice(at, 1); drawStrip(); } }, "✕"))));
  }
  part(panel, "add").addEventListener("click", () => { classes.push(add.value); drawStrip(); });
  dice(panel);

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (classes.length < 2) return void toast("A walk needs two classes at least.");
    const asked = { model: model.value, classes, seed: Number(seed.value), steps: Number(steps.value) };
    work(panel.querySelector("[data-work]"), "Walking", async (ask) => {
      const begun = performance.now();
      const made = await ask("/api/interpolate", { json: asked });
      stop();
      walk = { ...made, asked: { ...asked, classes: [...classes] }, maps: made.maps.map((maps) => new Maps(maps)) };
      walk.bitmaps = await Promise.all(made.images.map(bitmapOf));
      part(panel, "empty").hidden = true;
      part(panel, "walk").hidden = false;
      part(panel, "map-figure").hidden = !walk.maps.length;
      entity.replaceChildren(...Array.from({ length: walk.maps[0]?.entities ?? 0 }, (_, k) => el("option", { value: String(k) }, String(k))));
      entity.value = String(made.entity);
      setScale();
      [slide.max, slide.value] = [walk.bitmaps.length - 1, 0];
      const names = modelOf(asked.model).classes;
      part(panel, "ticks").replaceChildren(...classes.map((label, at) => {
        const tick = el("span", {}, names[label]);
        tick.style.left = `${(100 * at) / (classes.length - 1)}%`;
        return tick;
      }));
      part(panel, "film").replaceChildren(...made.images.map((png, number) =>
        el("button", { type: "button", "aria-label": `Step ${number + 1}`, onclick: () => go(number) }, el("img", { src: pngUrl(png), alt: "", class: "tiny" }))));
      part(panel, "summary").textContent = `${made.images.length} pictures in ${seconds((performance.now() - begun) / 1000)}`;
      draw();
    });
  });

  const go = (number) => { slide.value = number; draw(); };
  function setScale() { // one along the walk
    const ranges = walk.maps.map((maps) => maps.range(Number(entity.value)));
    walk.scale = [Math.min(...ranges.map(([low]) => low)), Math.max(...ranges.map(([, high]) => high))];
  }
  const draw = framed(() => {
    if (!walk) return;
    const number = Number(slide.value);
    drawImage(part(panel, "image"), walk.bitmaps[number]);
    if (walk.maps.length) drawMap(part(panel, "map"), walk.maps[number], Number(entity.value), walk.scale);
    const names = modelOf(walk.asked.model)?.classes ?? [];
    const leg = Math.min(Math.floor(number / (walk.asked.steps - 1)), walk.asked.classes.length - 2);
    const share = number / (walk.asked.steps - 1) - leg;
    const [from, to] = [names[walk.asked.classes[leg]], names[walk.asked.classes[leg + 1]]];
    const where = `${Math.round(100 * (1 - share))}% ${from}, ${Math.round(100 * share)}% ${to}`;
    part(panel, "where").textContent = where;
    slide.setAttribute("aria-valuetext", where);
    part(panel, "film").querySelector("[aria-current]")?.removeAttribute("aria-current");
    part(panel, "film").children[number].setAttribute("aria-current", "true");
  });
  slide.addEventListener("input", draw);
  entity.addEventListener("change", () => { setScale(); draw(); });

  const play = part(panel, "play");
  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "▶";
    play.setAttribute("aria-label", "Play");
  }
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "Pause");
    let step = 1;
    timer = setInterval(() => {
      if (Number(slide.value) + step > Number(slide.max) || Number(slide.value) + step < 0) step = -step;
      go(Number(slide.value) + step);
    }, 80);
  });
  panel.addEventListener("closed", stop);

  for (const format of ["gif", "png"])
    part(panel, format).addEventListener("click", () =>
      work(panel.querySelector("[data-work]"), "Drawing", async (ask) => {
        const answer = await ask("/api/interpolate", { json: { ...walk.asked, format }, accept: `image/${format}` });
        save(await answer.blob(), `walk.${format}`);
      }));
  part(panel, "recipe").addEventListener("click", () => saveJson(walk.recipe, "recipe.json"));
}
