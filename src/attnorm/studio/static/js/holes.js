// Fill holes: a photograph, its mask, the methods, and what they made of it.

import { call, work } from "./api.js";
import { bitmapOf, el, part, percent, pngBlob, save, saveJson, seconds, toast } from "./dom.js";
import { describe, known, modelOf } from "./models.js";
import { Mask } from "./mask.js";
import { Matches } from "./matches.js";
import { Pens } from "./pens.js";
import { View } from "./view.js";

export function initHoles(panel) {
  const form = panel.querySelector("form");
  const fields = form.elements;
  const place = form.querySelector("[data-work]");
  const editor = part(panel, "editor");
  const divider = part(panel, "divider");
  const view = new View(part(panel, "view"));
  const matches = new Matches(panel, view);
  const pens = new Pens(view, editor, { after: changed, moved: (at) => matches.point(at), run: () => form.requestSubmit() });
  let photograph = null; // { name, blob, bitmap, width, height, format, note }
  let results = [];
  let selected = null;
  const past = []; // photographs that were filled, each with what it was called
  panel.studio = { view, pens }; // for measurements

  // Photographs

  async function open(blob, name, said = "") {
    if (blob.size > known.limits.upload_bytes)
      return void toast(`${name} has ${Math.ceil(blob.size / 2 ** 20)} MiB; ${known.limits.upload_bytes / 2 ** 20} MiB is the most.`);
    return work(place, "Reading", async (ask) => {
      const body = new FormData();
      body.append("image", blob, name);
      const read = await ask("/api/photograph", { form: body });
      photograph = { ...read, name, blob, bitmap: await bitmapOf(read.preview) };
      [results, selected] = [[], null];
      view.show(photograph.bitmap, new Mask(read.width, read.height));
      pens.resize(Math.max(read.width, read.height) / 40);
      part(panel, "empty").hidden = true;
      part(panel, "after").hidden = divider.hidden = true;
      matches.show(null);
      changed();
      status(said);
      sharpen(photograph);
      editor.scrollIntoView({ block: "nearest" });
      return true;
    });
  }

  // The preview is reduced: for who zooms in, all pixels of a large photograph, where the browser reads them as the
  // studio does.
  async function sharpen(opened) {
    const { blob, bitmap, width, height, mode } = opened;
    if (bitmap.width === width || !["RGB", "L"].includes(mode)) return;
    const fine = await createImageBitmap(blob, { colorSpaceConversion: "none" }).catch(() => null);
    if (fine?.width !== width || fine.height !== height || photograph !== opened) return;
    view.fine = fine;
    view.draw();
  }

  const openFile = (file) => file && open(file, file.name || "pasted.png");
  fields.photo.addEventListener("change", () => { openFile(fields.photo.files[0]); fields.photo.value = ""; });
  fields.example.addEventListener("change", async () => {
    const name = fields.example.value;
    fields.example.value = "";
    if (!name) return;
    const answer = await call(`/api/examples/${name}`, { accept: "image/png" }).catch((error) => void toast(error.message));
    if (answer) open(await answer.blob(), `${name}.png`);
  });
  addEventListener("models", () => {
    fields.example.replaceChildren(fields.example.options[0], ...known.examples.map((name) => el("option", {}, name)));
    const boxes = [...part(panel, "methods").querySelectorAll("input")];
    const isTicked = (value, isFirst) => (boxes.length ? boxes.some((box) => box.checked && box.value === value) : isFirst);
    const models = known.models.filter((model) => model.task === "inpainting");
    const choice = (value, title, said, checked, disabled) =>
      el("label", {}, el("input", { type: "checkbox", name: "method", value, checked, disabled }), el("span", {}, title, el("small", {}, said)));
    const first = models.find((model) => !model.problem);
    part(panel, "methods").replaceChildren(
      ...models.map((model) => choice(model.id, model.id, model.problem || `${describe(model)}, ${model.context}`, isTicked(model.id, model === first), !!model.problem)),
      ...Object.entries(known.methods).map(([name, title]) => choice(name, title, "needs no model", isTicked(name, name === "telea"), false)));
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file && !panel.hidden) openFile(file);
  });
  // Anywhere in the window: a browser would leave the page for a file that misses the editor.
  for (const name of ["dragover", "dragleave", "drop"])
    addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      editor.classList.toggle("over", name === "dragover");
      if (name === "drop" && !panel.hidden) openFile(event.dataTransfer.files[0]);
    });

  // The mask

  const { tool: tools, size } = fields;
  for (const radio of tools) radio.addEventListener("change", () => { if (radio.checked) setTool(radio.value); });
  function setTool(name) {
    pens.tool = tools.value = name;
    if (view.cursor) pens.setCursor(view.cursor.at);
  }
  const top = () => (photograph ? Math.max(photograph.width, photograph.height) / 4 : 200); // radius at the right end
  size.addEventListener("input", () => pens.resize(0.5 * (2 * top()) ** (size.value / 100)));
  pens.resized = () => {
    size.value = (100 * Math.log(2 * pens.radius)) / Math.log(2 * top());
    part(panel, "size").textContent = `${Math.round(2 * pens.radius)} px`;
  };
  const edit = (change) => () => {
    if (!photograph) return void toast("Open a photograph first.");
    change(view.mask);
    view.tint();
    view.mask.commit();
    changed();
  };
  const step = () => Math.max(Math.round(Math.max(photograph.width, photograph.height) / 128), 1);
  const edits = {
    clear: edit((mask) => mask.clear()),
    invert: edit((mask) => mask.invert()),
    grow: edit((mask) => mask.grow(step())),
    shrink: edit((mask) => mask.grow(-step())),
    undo: edit((mask) => mask.undo()),
    redo: edit((mask) => mask.redo()),
    "zoom-in": () => view.zoom(1.4),
    "zoom-out": () => view.zoom(1 / 1.4),
    fit: () => view.fit(),
  };
  for (const [name, act] of Object.entries(edits)) part(panel, name).addEventListener("click", act);
  fields.mask.addEventListener("change", async () => {
    const file = fields.mask.files[0];
    fields.mask.value = "";
    if (!file || !photograph) return void toast("Open a photograph first.");
    try {
      const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
      edit((mask) => mask.load(bitmap))();
    } catch (error) {
      toast(error instanceof RangeError ? error.message : `${file.name} is no picture that this browser can read.`);
    }
  });
  part(panel, "save-mask").addEventListener("click", async () => {
    if (photograph) save(await view.mask.toBlob(), `${stem(photograph.name)}-mask.png`);
  });

  function changed() {
    view.hidesMask = false;
    part(panel, "undo").disabled = !view.mask.past.length;
    part(panel, "redo").disabled = !view.mask.future.length;
    status();
  }
  function status(said = "") {
    const { width, height, format, note, name } = photograph;
    const share = view.mask.share;
    const missing = share === 0 ? "nothing is marked yet" : share === 1 ? "everything is marked: leave something known" : `${share < 0.0005 ? "less than 0.1%" : percent(share)} is marked`;
    part(panel, "status").textContent = [said, `${name}, ${width} × ${height}, ${format}: ${missing}`, note].filter(Boolean).join("; ");
  }

  const keys = { b: () => setTool("brush"), e: () => setTool("eraser"), r: () => setTool("rectangle"), l: () => setTool("lasso"),
    "[": () => pens.resize(pens.radius / 1.15), "]": () => pens.resize(pens.radius * 1.15), i: edits.invert, g: edits.grow, G: edits.shrink,
    "+": edits["zoom-in"], "=": edits["zoom-in"], "-": edits["zoom-out"], 0: edits.fit };
  addEventListener("keydown", (event) => {
    if (panel.hidden || document.querySelector("dialog[open]") || event.target.closest?.("input[type=number], input[type=text], select")) return;
    const isUndo = (event.ctrlKey || event.metaKey) && "zZyY".includes(event.key);
    if (isUndo) edits[event.shiftKey || event.key.toLowerCase() === "y" ? "redo" : "undo"]();
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "Enter" && event.shiftKey) form.requestSubmit();
    else if (event.key === "h") { view.isPeeking = true; view.draw(); }
    else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });
  addEventListener("keyup", (event) => { if (event.key === "h") { view.isPeeking = false; view.draw(); } });

  // Filling

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const methods = [...part(panel, "methods").querySelectorAll(":checked")].map((box) => box.value);
    if (!photograph) return void toast("Open a photograph first.");
    if (!methods.length) return void toast("Choose a method to fill with.");
    if (!view.mask.count || view.mask.share === 1) return void toast(view.mask.count ? "Everything is marked: leave something known." : "Mark first what is missing.");
    const mask = await view.mask.toBlob();
    const filled = [];
    for (const method of methods) {
      const result = await work(place, `Filling with ${method}`, async (ask) => fill(ask, method, mask, ""));
      if (!result) break;
      filled.push(result);
      show(filled);
    }
    if (filled.length === methods.length) editor.scrollIntoView({ block: "nearest" });
  });

  async function fill(ask, method, mask, format) {
    const body = new FormData();
    body.append("image", photograph.blob, photograph.name);
    body.append("mask", mask, "mask.png");
    const asked = new URLSearchParams({ method, format, layouts: "true", scores: String(fields.scores.checked) });
    const result = await ask(`/api/inpaint?${asked}`, { form: body });
    const [t, l, b, r] = result.box; // as a picture without transparency: scaled, its edges show nothing of the hole
    const context = new OffscreenCanvas(r - l, b - t).getContext("2d");
    context.drawImage(view.fine ?? photograph.bitmap, -l, -t, photograph.width, photograph.height);
    context.drawImage(await bitmapOf(result.patch), 0, 0);
    return { ...result, mask, patch: context.canvas.transferToImageBitmap(), photograph };
  }

  const titleOf = (result) => known.methods[result.method] ?? result.method;
  function show(filled) {
    results = filled;
    part(panel, "after").hidden = divider.hidden = false;
    part(panel, "left").replaceChildren(el("option", { value: "" }, "as it was"), ...results.map((result, at) => el("option", { value: String(at) }, titleOf(result))));
    part(panel, "results").replaceChildren(...results.map((result, at) => {
      const canvas = el("canvas", { role: "img", "aria-label": `Filled with ${titleOf(result)}` });
      crop(canvas, result);
      const { psnr_hole: psnr, ssim_whole: ssim } = result.scores;
      const scores = psnr === undefined ? "" : `; hole ${psnr.toFixed(1)} dB${ssim === undefined ? "" : `, SSIM ${ssim.toFixed(3)}`}`;
      return el("li", {}, el("button", { type: "button", onclick: () => select(at) }, canvas, el("b", {}, titleOf(result)), el("small", {}, seconds(result.seconds) + scores)));
    }));
    select(selected && results.includes(selected) ? results.indexOf(selected) : results.length > 1 && selected ? 0 : results.length - 1);
    if (results.length === 1) setDivide(0.5);
  }

  // Twice the hole's box, as far as the picture goes.
  function crop(canvas, { patch, box: [t, l, b, r] }) {
    const { bitmap, width, height } = photograph;
    const side = Math.min(Math.max(2 * Math.max(r - l, b - t), (32 * width) / bitmap.width), width, height);
    const start = (middle, size) => Math.min(Math.max(middle - side / 2, 0), size - side);
    const [x, y, zoom] = [start((l + r) / 2, width), start((t + b) / 2, height), 160 / side];
    canvas.width = canvas.height = 160;
    const context = canvas.getContext("2d");
    context.setTransform(zoom, 0, 0, zoom, -x * zoom, -y * zoom);
    context.drawImage(bitmap, 0, 0, width, height);
    context.drawImage(patch, l, t);
  }

  function select(at) {
    selected = results[at];
    view.after = selected;
    view.hidesMask = true;
    [...part(panel, "results").querySelectorAll("button")].forEach((button, number) => button.setAttribute("aria-pressed", String(number === at)));
    const model = modelOf(selected.method);
    matches.show(selected, model && !selected.views.length ? `${model.id} has no layout to show: the layer is not in it (${model.context}).` : "");
    status([`Filled with ${titleOf(selected)} in ${seconds(selected.seconds)}`, selected.note].filter(Boolean).join("; "));
    view.draw();
  }

  part(panel, "left").addEventListener("change", (event) => {
    view.left = event.target.value === "" ? null : results[event.target.value];
    view.draw();
  });
  const setDivide = (share) => {
    view.divide = Math.min(Math.max(share, 0), 1);
    divider.style.left = `${100 * view.divide}%`;
    divider.setAttribute("aria-valuenow", String(Math.round(100 * view.divide)));
    view.draw();
  };
  divider.addEventListener("pointerdown", (event) => divider.setPointerCapture(event.pointerId));
  divider.addEventListener("pointermove", (event) => {
    const box = editor.getBoundingClientRect();
    if (divider.hasPointerCapture(event.pointerId)) setDivide((event.clientX - box.left) / box.width);
  });
  divider.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: view.divide - 0.02, ArrowRight: view.divide + 0.02, Home: 0, End: 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    setDivide(to);
  });

  part(panel, "download").addEventListener("click", async () => {
    const format = part(panel, "format").value;
    let result = selected;
    if (format && format !== photograph.format)
      result = await work(place, "Writing", (ask) => fill(ask, selected.method, selected.mask, format));
    if (result) save(pngBlob(result.file, result.media_type), nameOf(result));
  });
  const stem = (name) => name.replace(/\.[^.]*$/, "");
  const nameOf = (result) => {
    const own = photograph.name.match(/\.[^.]*$/)?.[0] ?? ".png";
    const suffix = { "image/png": ".png", "image/tiff": ".tif" }[result.media_type] ?? own;
    return `${stem(photograph.name)}-filled${suffix}`;
  };
  part(panel, "recipe").addEventListener("click", () => saveJson(selected.recipe, "recipe.json"));

  part(panel, "adopt").addEventListener("click", async () => {
    const before = photograph;
    let result = selected;
    if (before.format === "JPEG") // which would change the other pixels each time
      result = await work(place, "Writing", (ask) => fill(ask, selected.method, selected.mask, "PNG"));
    if (!result || !(await open(pngBlob(result.file, result.media_type), nameOf(result), `Filled with ${titleOf(result)}`))) return;
    past.push(before);
    drawHistory();
  });
  function drawHistory() {
    part(panel, "history-box").hidden = !past.length;
    part(panel, "history").replaceChildren(...past.map((earlier, at) => {
      const canvas = el("canvas", { role: "img", "aria-label": earlier.name });
      const { bitmap } = earlier;
      canvas.width = canvas.height = 96;
      const side = Math.min(bitmap.width, bitmap.height);
      canvas.getContext("2d").drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, 96, 96);
      return el("li", {}, el("button", { type: "button", onclick: () => back(at) }, canvas, el("small", {}, `${at + 1}: ${earlier.name}`)));
    }));
  }
  async function back(at) {
    const [earlier, before] = [past[at], photograph];
    if (!(await open(earlier.blob, earlier.name))) return;
    past[at] = before;
    drawHistory();
  }
}
