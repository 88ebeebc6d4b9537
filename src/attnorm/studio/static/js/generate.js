// Pictures by class: a grid, and each of them enlarged with its layout, its recipe and more.

import { work } from "./api.js";
import { el, part, percent, pngBlob, pngUrl, save, saveJson, seconds, toast } from "./dom.js";
import { Maps, drawWinners } from "./maps.js";
import { dice, known, modelOf } from "./models.js";

export function initGenerate(panel, open) {
  const form = panel.querySelector("form");
  const { model, filter, seed, count, truncation, recipe } = form.elements;
  const choices = part(panel, "classes");
  let shown = null; // { images, request, recipe }

  const chosen = () => [...choices.querySelectorAll(":checked")].map((box) => box.value);
  const tell = () => (part(panel, "chosen").textContent = `${chosen().length} chosen`);
  const boxes = () => [...choices.querySelectorAll("label:not([hidden]) input")];
  const limit = () => (Number(truncation.value) >= Number(truncation.max) ? null : Number(truncation.value));

  model.addEventListener("change", () => {
    const classes = modelOf(model.value)?.classes ?? [];
    choices.replaceChildren(...classes.map((name, number) =>
      el("label", {}, el("input", { type: "checkbox", value: String(number), checked: number < 4 }), name)));
    filter.hidden = classes.length < 13;
    tell();
  });
  filter.addEventListener("input", () => {
    for (const label of choices.children) label.hidden = !label.textContent.toLowerCase().includes(filter.value.toLowerCase());
  });
  choices.addEventListener("change", tell);
  for (const [name, value] of [["all", true], ["none", false]])
    part(panel, name).addEventListener("click", () => { for (const box of boxes()) box.checked = value; tell(); });
  truncation.addEventListener("input", () => (part(panel, "truncation").textContent = limit() ?? "off"));
  dice(panel);

  const request = () => ({ model: model.value, classes: chosen(), seed: Number(seed.value), count: Number(count.value), truncation: limit() });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate(request());
  });

  async function generate(asked) {
    const place = panel.querySelector("[data-work]");
    const total = asked.classes.length * asked.count;
    if (!asked.classes.length) return void toast("Choose one class at least.");
    if (total > known.limits.images) return void toast(`These are ${total} pictures; ${known.limits.images} is the most at a time.`);
    const results = part(panel, "results");
    const begun = performance.now();
    const names = modelOf(asked.model).classes;
    const size = modelOf(asked.model).image_size;
    const cells = asked.classes.map(() => Array.from({ length: asked.count }, () => el("div", { class: "waiting" })));
    results.classList.toggle("tiny", size <= 64);
    results.replaceChildren(...asked.classes.map((label, row) =>
      el("section", {}, el("h2", {}, names[label] ?? label), el("div", { class: "grid" }, ...cells[row]))));
    part(panel, "empty").hidden = true;
    part(panel, "bar").hidden = true;
    const images = [];
    const done = await work(place, "Making pictures", async (ask) => {
      let made = null;
      let busy = 0;
      // The first picture by itself, so that it is there at once; then the rest of its class, and a class at a time.
      for (const [row, label] of asked.classes.entries())
        for (const [first, many] of row || asked.count === 1 ? [[0, asked.count]] : [[0, 1], [1, asked.count - 1]]) {
          ask.tell(images.length, total);
          made = await ask("/api/generate", { json: { ...asked, classes: [label], seed: asked.seed + first, count: many } });
          busy += made.seconds;
          for (const [i, image] of made.images.entries()) {
            const entry = { ...image, label, truncation: asked.truncation, model: asked.model };
            images.push(entry);
            const picture = el("img", { src: pngUrl(image.png), alt: `${image.class}, seed ${image.seed}` });
            cells[row][first + i].replaceWith(el("button", { type: "button", onclick: () => enlarge(images, images.indexOf(entry)) }, picture));
          }
        }
      return { recipe: { ...made.recipe, request: { ...asked, format: "json" } }, busy };
    });
    for (const cell of results.querySelectorAll(".waiting")) cell.remove();
    if (!images.length) results.replaceChildren(); // no headings of nothing
    part(panel, "empty").hidden = images.length > 0;
    if (!done) return;
    shown = { images, recipe: done.recipe };
    part(panel, "bar").hidden = false;
    part(panel, "summary").textContent = `${images.length} pictures in ${seconds((performance.now() - begun) / 1000)}, ${seconds(done.busy)} of it in the network. ${done.recipe.note}`;
  }

  part(panel, "recipe").addEventListener("click", () => saveJson(shown.recipe, "recipe.json"));
  part(panel, "zip").addEventListener("click", () =>
    work(panel.querySelector("[data-work]"), "Packing", async (ask) => {
      const answer = await ask("/api/generate", { json: { ...shown.recipe.request, format: "zip" }, accept: "application/zip" });
      save(await answer.blob(), "pictures.zip");
    }));
  recipe.addEventListener("change", async () => {
    const text = await recipe.files[0]?.text();
    recipe.value = "";
    try {
      const asked = JSON.parse(text).request;
      const fitting = modelOf(asked.model);
      if (!fitting || fitting.problem) return void toast(`The recipe is for the model ${asked.model}, which is not at hand.`);
      model.value = asked.model;
      model.dispatchEvent(new Event("change"));
      const labels = asked.classes.map((name) => (fitting.classes.includes(name) ? String(fitting.classes.indexOf(name)) : name));
      for (const box of choices.querySelectorAll("input")) box.checked = labels.includes(box.value);
      [seed.value, count.value, truncation.value] = [asked.seed, asked.count, asked.truncation ?? truncation.max];
      truncation.dispatchEvent(new Event("input"));
      tell();
      generate({ model: asked.model, classes: labels, seed: Number(asked.seed), count: Number(asked.count), truncation: asked.truncation ?? null });
    } catch {
      toast("This file is no recipe of the studio.");
    }
  });

  // One picture enlarged

  const zoom = document.getElementById("zoom");
  const image = part(zoom, "image");
  let current = 0;
  let list = [];
  const entry = () => list[current];
  const ask = () => ({ model: entry().model, class: entry().label, seed: entry().seed, truncation: entry().truncation });

  function enlarge(images, number) {
    [list, current] = [images, (number + images.length) % images.length];
    image.src = pngUrl(entry().png);
    image.alt = `${entry().class}, seed ${entry().seed}`;
    image.classList.toggle("tiny", modelOf(entry().model).image_size <= 64);
    part(zoom, "caption").textContent = `${entry().class}, seed ${entry().seed}`;
    part(zoom, "layout").hidden = true;
    const hasLayer = modelOf(entry().model).entities > 0;
    part(zoom, "show-layout").hidden = part(zoom, "see").hidden = !hasLayer;
    if (!zoom.open) zoom.showModal();
  }

  part(zoom, "previous").addEventListener("click", () => enlarge(list, current - 1));
  part(zoom, "next").addEventListener("click", () => enlarge(list, current + 1));
  zoom.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) enlarge(list, current + step);
  });
  part(zoom, "show-layout").addEventListener("click", () =>
    work(part(zoom, "verdict"), "Looking", async (request) => {
      part(zoom, "layout").hidden = false;
      const { sites } = await request("/api/layout", { json: ask() });
      const maps = new Maps(sites[0].maps);
      drawWinners(part(zoom, "winners"), maps);
      const used = sites[0].facts.usage.filter((share) => share > 0).length;
      part(zoom, "verdict").textContent = `Entropy ${sites[0].facts.entropy.toFixed(2)}; ${used} of ${maps.entities} entities win pixels, the largest ${percent(Math.max(...sites[0].facts.usage))}`;
    }));
  part(zoom, "see").addEventListener("click", () => {
    zoom.close();
    open("layer", { focus: true });
    document.getElementById("layer").dispatchEvent(new CustomEvent("see", { detail: ask() }));
  });
  part(zoom, "save").addEventListener("click", () => save(pngBlob(entry().png), `${entry().label}-${entry().seed}.png`));
  part(zoom, "recipe").addEventListener("click", () => {
    const { model: name, label, seed: number, truncation: limited } = entry();
    const asked = { model: name, classes: [label], seed: number, count: 1, truncation: limited, format: "json" };
    saveJson({ ...shown?.recipe, request: asked }, `recipe-${label}-${number}.json`);
  });
}
