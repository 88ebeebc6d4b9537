// Runs while they train: curves, samples, layouts. What is drawn comes as server-sent events.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { call } from "./api.js";
import { el, part, percent, toast } from "./dom.js";
import { Maps, drawWinners } from "./maps.js";
import { modelOf } from "./models.js";

const COLOURS = ["#2f7ed8", "#e08a2e", "#3aa655", "#d1495b", "#8d6fd1", "#22b8cf", "#a47148", "#e377c2"];
const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
// Panels in their order: title, and which names of metrics.jsonl it shows.
const PANELS = [
  ["Losses", (key) => ["generator/loss", "discriminator/loss"].includes(key)],
  ["Scores of the discriminator", (key) => ["discriminator/real_score", "discriminator/fake_score"].includes(key)],
  ["Validation, L1 in [-1, 1]", (key) => key.startsWith("validation/") && key.endsWith("l1")],
  ["Critics: distance", (key) => key === "critic/distance"],
  ["Critics: gradient penalty", (key) => key === "critic/gradient_penalty"],
  ["Entropy of the layout (1: the layer sleeps)", (key) => key.startsWith("layout/") && key.endsWith("/entropy")],
  ["Entities in use", (key) => key.startsWith("layout/") && key.endsWith("/usage")],
];

export function initRuns(panel) {
  const form = panel.querySelector("form");
  const list = part(panel, "runs");
  const runs = new Map(); // name to { rows, status, cards }
  let source = null;
  let plots = [];
  let wanted = 0;
  let again = 0; // a timer

  const chosen = () => [...list.querySelectorAll(":checked")].map((box) => box.value);
  const colourOf = (name) => COLOURS[[...list.querySelectorAll("input")].findIndex((box) => box.value === name) % COLOURS.length];

  panel.addEventListener("opened", async () => {
    clearTimeout(again);
    const listed = await call("/api/runs").catch((error) => {
      part(panel, "live").textContent = error.message;
      later();
    });
    if (!listed || panel.hidden) return;
    const before = list.children.length ? chosen() : Object.keys(listed).filter((name) => !listed[name].problem).slice(0, 1);
    list.replaceChildren(...Object.entries(listed).map(([name, status], number) => {
      const swatch = el("i");
      swatch.style.background = COLOURS[number % COLOURS.length];
      return el("label", {}, el("input", { type: "checkbox", value: name, checked: before.includes(name), disabled: !!status.problem }), swatch,
        el("span", {}, name, el("small", {}, status.problem || `${status.preset || status.task}, ${progress(status)}`)));
    }));
    if (!list.children.length) list.append(el("p", { class: "note" }, "The studio was started without runs: attnorm studio RUN"));
    watch();
  });
  panel.addEventListener("closed", () => { clearTimeout(again); source?.close(); source = null; });
  list.addEventListener("change", watch);
  form.addEventListener("input", (event) => { if (!list.contains(event.target)) redraw(); });
  addEventListener("theme", redraw);

  const later = () => { if (!panel.hidden) again = setTimeout(() => panel.dispatchEvent(new CustomEvent("opened")), 3000); };

  const progress = ({ checkpoint, duration_images: all, seconds_since_change: age }) =>
    `${checkpoint === null ? "no checkpoint yet" : `checkpoint at ${checkpoint.toLocaleString("en")} of ${all.toLocaleString("en")} images`}${age !== undefined && age !== null && age < 90 ? ", training" : ""}`;

  function watch() {
    source?.close();
    source = null;
    const names = chosen();
    for (const name of runs.keys()) if (!names.includes(name)) runs.delete(name);
    for (const name of names) if (!runs.has(name)) runs.set(name, { rows: [], status: null, card: makeCard(name) });
    part(panel, "samples").replaceChildren(...names.map((name) => runs.get(name).card.element));
    part(panel, "empty").hidden = names.length > 0;
    part(panel, "live").textContent = names.length ? "Connecting …" : "";
    redraw();
    if (!names.length) return;
    source = new EventSource(`/api/runs/events?${new URLSearchParams(names.map((name) => ["run", name]))}`);
    for (const name of names) runs.get(name).rows = []; // they come again from the first on
    source.addEventListener("rows", (event) => {
      const { run, anew, rows } = JSON.parse(event.data);
      const known = runs.get(run);
      if (!known) return;
      known.rows = anew ? rows : known.rows.concat(rows);
      const last = known.rows.at(-1);
      part(panel, "live").textContent = last ? `Live: ${run} has seen ${last.images_seen.toLocaleString("en")} images.` : "Live.";
      redraw();
    });
    source.addEventListener("status", (event) => {
      const status = JSON.parse(event.data);
      const known = runs.get(status.run);
      if (known) { known.status = status; known.card.update(status); }
    });
    source.addEventListener("problem", (event) => toast(JSON.parse(event.data).problem));
    source.onopen = () => { for (const name of names) runs.get(name).rows = []; };
    source.onerror = () => {
      part(panel, "live").textContent = "The connection was lost; trying again …";
      // Refused, as by a studio that was started with other runs: the browser does not try again.
      if (source.readyState === EventSource.CLOSED) later();
    };
  }

  // Samples and layout of a run

  function makeCard(name) {
    const image = el("img", { alt: `Samples of ${name}` });
    const slide = el("input", { type: "range", min: "0", max: "0", value: "0", "aria-label": `Samples of ${name} over time` });
    const said = el("p");
    const maps = el("div", { class: "maps" });
    const verdict = el("p");
    const sees = el("div", {}, maps, verdict);
    const element = el("article", {}, el("h2", {}, name), el("div", { class: "run" }, el("div", {}, image, slide, said), sees));
    let samples = [];
    let isLatest = true;
    const show = () => {
      const number = samples[slide.value];
      if (number === undefined) return;
      const address = `/api/runs/${encodeURIComponent(name)}/samples/${number}`;
      if (image.getAttribute("src") !== address) image.src = address;
      said.textContent = `Samples at ${number.toLocaleString("en")} images seen`;
    };
    slide.addEventListener("input", () => { isLatest = slide.value === slide.max; show(); });
    let checkpoint;
    const layout = async () => {
      try {
        if (!maps.children.length) verdict.textContent = "Looking at its layout …";
        const { sites } = await call("/api/layout", { json: { model: name, class: "0", seed: 0 } });
        const { facts } = sites[0];
        verdict.textContent = `Who wins each pixel of the first class: entropy ${facts.entropy.toFixed(2)}, ${facts.verdict}; largest region ${percent(Math.max(...facts.usage))}`;
        maps.replaceChildren(...sites.slice(0, 3).map((site) => {
          const canvas = el("canvas", { role: "img", "aria-label": `Who wins each pixel at ${site.name}` });
          drawWinners(canvas, new Maps(site.maps));
          return canvas;
        }));
      } catch (error) {
        verdict.textContent = error.message;
      }
    };
    const update = (status) => {
      samples = status.samples;
      slide.max = Math.max(samples.length - 1, 0);
      if (isLatest) slide.value = slide.max;
      image.hidden = slide.hidden = !samples.length;
      if (!samples.length) said.textContent = "No samples yet.";
      const model = modelOf(name);
      sees.hidden = !(status.task === "class_conditional" && model?.entities) || status.checkpoint === null;
      if (status.checkpoint !== checkpoint && !sees.hidden) layout();
      checkpoint = status.checkpoint;
      show();
    };
    return { element, update };
  }

  // Curves

  function redraw() {
    cancelAnimationFrame(wanted);
    wanted = requestAnimationFrame(draw);
  }

  function draw() {
    const box = part(panel, "curves");
    for (const plot of plots) plot.destroy();
    plots = [];
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = ["--soft", "--line"].map((name) => style.getPropertyValue(name));
    const figures = PANELS.map(([title, fits]) => {
      const curves = [...runs].flatMap(([name, { rows }]) => curvesOf(name, rows, fits));
      return curves.length ? { title, curves } : null;
    }).filter(Boolean);
    box.replaceChildren(...figures.map(({ title }) => el("figure", {}, el("h2", {}, title))));
    figures.forEach(({ curves }, at) => {
      const figure = box.children[at];
      const names = [...new Set(curves.map(({ label }) => label))];
      const data = uPlot.join(curves.map(({ xs, ys }) => [xs, ys]));
      const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
      const options = {
        width: figure.clientWidth - 24, height: 220, cursor: { y: false }, scales: { x: { time: false } },
        axes: [{ ...axis, values: (_, ticks) => ticks.map(short) }, { ...axis, size: 56, values: (_, ticks) => ticks.map(short) }],
        series: [{ label: form.elements.x.value === "hours" ? "hours" : "images", value: (_, value) => (value === null ? "" : short(value)) },
          ...curves.map(({ run, label }) => ({ label: runs.size > 1 ? `${run} ${label}` : label, stroke: runs.size > 1 ? colourOf(run) : COLOURS[names.indexOf(label) % COLOURS.length],
            dash: runs.size > 1 ? DASHES[names.indexOf(label) % DASHES.length] : [], width: 1.5, spanGaps: true, points: { show: false }, value: (_, value) => (value === null ? "" : value.toPrecision(4)) }))],
      };
      plots.push(new uPlot(options, data, figure));
    });
    if (runs.size && !figures.length && [...runs.values()].every(({ rows }) => !rows.length)) box.replaceChildren(el("p", { class: "empty" }, "Nothing has been logged yet."));
  }

  function curvesOf(run, rows, fits) {
    const keys = [...new Set(rows.flatMap(Object.keys))].filter(fits).sort();
    const hours = form.elements.x.value === "hours";
    return keys.map((key) => {
      const kept = rows.filter((row) => key in row && (!hours || typeof row.seconds === "number"));
      const xs = kept.map((row) => (hours ? row.seconds / 3600 : row.images_seen));
      const ys = kept.map((row) => (Array.isArray(row[key]) ? effective(row[key]) : row[key]));
      const label = key.replace(/^(layout|validation|critic)\//, "").replace(/\/(entropy|usage)$/, "");
      return { run, label, xs, ys: form.elements.smooth.checked ? smooth(ys) : ys };
    }).filter(({ xs }) => xs.length);
  }
}

const effective = (usage) => Math.exp(-usage.reduce((sum, share) => sum + (share > 0 ? share * Math.log(share) : 0), 0));
const short = (value) => (Math.abs(value) >= 1e6 ? `${+(value / 1e6).toFixed(2)}M` : Math.abs(value) >= 1e3 ? `${+(value / 1e3).toFixed(1)}k` : `${+value.toPrecision(4)}`);

// A running mean over a fiftieth of the points.
function smooth(values) {
  const window = Math.max(Math.floor(values.length / 50), 1);
  let sum = 0;
  return values.map((value, at) => {
    sum += value - (at >= window ? values[at - window] : 0);
    return sum / Math.min(at + 1, window);
  });
}
