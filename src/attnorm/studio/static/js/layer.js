// What the layer sees: who wins each pixel, every entity's map, its statistics; and the image with entities edited.

import { work } from "./api.js";
import { bitmapOf, el, framed, part, percent } from "./dom.js";
import { Maps, colourOf, drawImage, drawMap, drawWinners, veil } from "./maps.js";
import { dice, fillClasses, modelOf } from "./models.js";

export function initLayer(panel) {
  const form = panel.querySelector("form");
  const { model, seed, site } = form.elements;
  const label = form.elements.class;
  const place = panel.querySelector("[data-work]");
  let seen = null; // { sites, image, edited, editedMaps }
  let off = new Set();
  let exchange = []; // entities chosen to change places: none, one, or two
  let lit = null;
  let truncation = null;

  model.addEventListener("change", () => fillClasses(label, modelOf(model.value)));
  dice(panel, () => form.requestSubmit());
  form.addEventListener("submit", (event) => { event.preventDefault(); [off, exchange] = [new Set(), []]; truncation = null; look(); });
  for (const field of [label, seed]) field.addEventListener("change", () => seen && form.requestSubmit());
  site.addEventListener("change", () => { [off, exchange] = [new Set(), []]; look(); });
  panel.addEventListener("see", ({ detail }) => {
    model.value = detail.model;
    model.dispatchEvent(new Event("change"));
    [label.value, seed.value, off, exchange, truncation] = [detail.class, detail.seed, new Set(), [], detail.truncation];
    look();
  });
  part(panel, "reset").addEventListener("click", () => { [off, exchange] = [new Set(), []]; look(); });

  function look() {
    const asked = { model: model.value, class: label.value, seed: Number(seed.value), truncation, site: site.value };
    if (seen?.model !== asked.model) asked.site = "";
    return work(place, "Looking", async (ask) => {
      const answer = await ask("/api/layout", { json: { ...asked, off: [...off], exchange: exchange.length === 2 ? exchange : null } });
      const at = Math.max(answer.sites.findIndex((one) => one.name === asked.site), 0);
      const isNew = seen?.model !== asked.model || seen.maps?.entities !== answer.sites[at].maps.entities;
      const edited = answer.edited_png ? await bitmapOf(answer.edited_png) : null;
      seen = { model: asked.model, facts: answer.sites[at].facts, maps: new Maps(answer.sites[at].maps), image: await bitmapOf(answer.png), edited };
      seen.editedMaps = edited ? new Maps(answer.edited_sites[at].maps) : null;
      site.replaceChildren(...answer.sites.map((one) => el("option", {}, one.name)));
      site.selectedIndex = at;
      part(panel, "site-label").hidden = answer.sites.length < 2;
      part(panel, "empty").hidden = true;
      part(panel, "seen").hidden = false;
      if (isNew) makeCards();
      showFacts();
      drawCards();
      light(null);
    });
  }

  function showFacts() {
    const { facts, maps } = seen;
    const used = Math.exp(-facts.usage.reduce((sum, share) => sum + (share > 0 ? share * Math.log(share) : 0), 0));
    const badge = el("span", { class: `badge ${facts.is_awake ? "good" : "bad"}` }, facts.is_awake ? "awake" : "asleep");
    const rows = { "The layer is": badge, Entropy: `${facts.entropy.toFixed(3)} of 1`, "Entities in use": `${used.toFixed(1)} of ${maps.entities}`,
      "Changes its input by": percent(facts.change), rho: facts.rho.toFixed(3), "Spread of logits": facts.spread.toFixed(2),
      "Whole map, mean": facts.whole.mean.toFixed(3), "Whole map, deviation": facts.whole.std.toFixed(3) };
    part(panel, "facts").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
    if (!facts.is_awake) part(panel, "facts").append(el("dt", {}, "Because"), el("dd", {}, facts.verdict.replace("asleep: ", "")));
    for (const figure of panel.querySelectorAll("[data-edited-figure]")) figure.hidden = !seen.edited;
    part(panel, "reset").disabled = !off.size && !exchange.length;
    part(panel, "difference").textContent = seen.edited ? `differs by ${difference(seen.image, seen.edited).toFixed(1)} of 255` : "";
  }

  // Entities

  function makeCards() {
    part(panel, "entities").replaceChildren(...Array.from({ length: seen.maps.entities }, (_, k) => {
      const swatch = el("i");
      swatch.style.background = colourOf(k);
      const points = { onpointerenter: () => light(k), onpointerleave: () => light(null), onfocusin: () => light(k), onfocusout: () => light(null) };
      return el("li", points,
        el("button", { type: "button", class: "map", "aria-label": `Entity ${k}: light its pixels`, onclick: () => light(k) }, el("canvas", { role: "img", "aria-label": `Map of entity ${k}` })),
        el("div", { class: "name" }, swatch, el("b", {}, String(k)), el("span")),
        el("div", { class: "edits" },
          el("button", { type: "button", "data-off": "", "aria-label": `Switch entity ${k} off`, onclick: () => toggle(k) }, "Off"),
          el("button", { type: "button", "data-swap": "", "aria-label": `Exchange entity ${k}`, onclick: () => swap(k) }, "Swap")));
    }));
  }

  function drawCards() {
    [...part(panel, "entities").children].forEach((card, k) => {
      drawMap(card.querySelector("canvas"), seen.maps, k);
      card.querySelector(".name span").textContent = percent(seen.facts.usage[k]);
      card.classList.toggle("off", off.has(k));
      part(card, "off").setAttribute("aria-pressed", String(off.has(k)));
      part(card, "swap").setAttribute("aria-pressed", String(exchange.includes(k)));
    });
  }

  function toggle(k) {
    if (!off.delete(k)) off.add(k);
    look();
  }
  function swap(k) {
    if (exchange.includes(k)) exchange = exchange.filter((other) => other !== k);
    else exchange = exchange.length === 2 ? [k] : [...exchange, k];
    drawCards();
    part(panel, "reset").disabled = !off.size && !exchange.length;
    if (exchange.length === 1 && !seen.edited) part(panel, "readout").textContent = `Now choose what entity ${k} is to change places with.`;
    else look();
  }

  // Lighting up a region

  const light = framed((k) => {
    if (!seen) return;
    lit = k;
    show("", seen.image, seen.maps, k);
    if (seen.edited) show("edited-", seen.edited, seen.editedMaps, k);
    panel.querySelector(".entities .lit")?.classList.remove("lit");
    if (k !== null) part(panel, "entities").children[k].classList.add("lit");
    tell(k);
  });

  function show(which, image, maps, k) {
    drawImage(part(panel, which ? "edited" : "image"), image, k === null ? null : veil(maps, k));
    drawWinners(part(panel, `${which}winners`), maps, k);
  }

  function tell(k) {
    const readout = part(panel, "readout");
    if (k === null) return void (readout.textContent = "Point at the image: the region that it belongs to lights up everywhere.");
    const region = seen.facts.regions[k];
    const swatch = el("i");
    swatch.style.background = colourOf(k);
    const text = region
      ? `Entity ${k}: ${percent(region.share)} of the pixels, mean ${region.mean.toFixed(3)} and deviation ${region.std.toFixed(3)}; the whole has ${seen.facts.whole.mean.toFixed(3)} and ${seen.facts.whole.std.toFixed(3)}.`
      : `Entity ${k} wins no pixel; its largest share of one is ${percent(seen.maps.range(k)[1] / 255)}.`;
    readout.replaceChildren(swatch, text);
  }

  for (const name of ["image", "winners", "edited", "edited-winners"]) {
    const canvas = part(panel, name);
    const point = (event) => {
      const maps = name.startsWith("edited") ? seen.editedMaps : seen.maps;
      const box = canvas.getBoundingClientRect();
      const k = maps.winners[maps.at((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height)];
      if (k !== lit) light(k);
    };
    for (const kind of ["pointerdown", "pointermove"]) canvas.addEventListener(kind, point);
    canvas.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") light(null); }); // a tap stays
  }
}

// Root mean square of the differences of two pictures of one size, in levels of 255.
function difference(first, second) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [first.width, first.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [one, other] = [first, second].map((picture) => {
    context.drawImage(picture, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height).data;
  });
  let sum = 0;
  for (let i = 0; i < one.length; i++) sum += (one[i] - other[i]) ** 2; // alpha is equal
  return Math.sqrt(sum / (0.75 * one.length));
}
