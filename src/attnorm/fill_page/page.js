// The page: a photograph, a mask that is painted over it, and a worker that fills it.

const find = (name) => document.querySelector(`[data-${name}]`);
const embedded = (id) => document.getElementById(id).textContent;
const metadata = JSON.parse(embedded("metadata"));
const [view, holes, said] = [find("view"), find("holes"), find("said")];
const look = view.getContext("2d", { alpha: false, willReadFrequently: true });
const pen = holes.getContext("2d", { willReadFrequently: true });
const state = { photo: null, name: "", filled: null, undo: [], stroke: null, busy: false, ready: false, address: "" };

function say(text, isBad = false) {
  said.textContent = text;
  said.classList.toggle("bad", isBad);
}

async function unpack(id) {
  const text = atob(embedded(id));
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function startWorker() {
  const worker = new Worker(URL.createObjectURL(new Blob([embedded("worker")], { type: "text/javascript" })));
  worker.onmessage = ({ data }) => {
    if (data.error) finish(() => say(data.error, true));
    else if (data.ready) finish(() => (state.ready = true));
    else if (data.of) say(`filling: ${data.done} of ${data.of}`);
    else show(data.pixels);
  };
  worker.onerror = (event) => finish(() => say(`this browser cannot run the model: ${event.message}`, true));
  const [runtime, wasm, model] = await Promise.all(["runtime", "wasm", "model"].map(unpack));
  worker.postMessage({ start: { runtime, wasm, model, metadata } }, [wasm, model]);
  return worker;
}

function finish(act) {
  state.busy = false;
  act();
  update();
}

function update() {
  find("tools").disabled = !state.photo || state.busy;
  find("fill").disabled = !state.photo || !state.ready || state.busy;
  find("fill").textContent = state.busy ? "Filling" : state.ready || said.classList.contains("bad") ? "Fill" : "Starting";
  find("undo").disabled = !state.undo.length;
  find("after").hidden = !state.filled;
  document.body.dataset.state = state.busy ? "busy" : state.ready ? "ready" : "starting";
}

// The photograph

async function readPicture(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name} is no picture that this browser reads; expected JPEG, PNG or WebP`);
  });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

async function choosePhoto(file) {
  const photo = await readPicture(file);
  if (Math.min(photo.width, photo.height) < Number(metadata.least_side)) {
    throw new Error(`it has ${photo.width}x${photo.height} pixels; expected ${metadata.least_side} or more a side`);
  }
  let isSeeThrough = false;
  for (let at = 3; at < photo.data.length; at += 4) {
    if (photo.data[at] === 255) continue;
    isSeeThrough = true;
    const alpha = photo.data[at] / 255;
    for (let of = at - 3; of < at; of++) photo.data[of] = photo.data[of] * alpha + 255 * (1 - alpha);
    photo.data[at] = 255;
  }
  Object.assign(state, { photo, name: file.name.replace(/\.[^.]*$/, ""), filled: null, undo: [] });
  for (const canvas of [view, holes]) [canvas.width, canvas.height] = [photo.width, photo.height];
  const room = matchMedia("(max-width: 760px)").matches ? 0.55 : 0.78;
  const grown = Math.max(1, Math.min(8, Math.floor(512 / Math.max(photo.width, photo.height))));
  find("picture").style.width = `min(${photo.width * grown}px, ${(innerHeight * room * photo.width) / photo.height}px)`;
  find("picture").classList.toggle("small", grown > 1);
  look.putImageData(photo, 0, 0);
  find("empty").hidden = true;
  find("picture").hidden = false;
  showSize();
  say(`${photo.width}x${photo.height} pixels${isSeeThrough ? "; what is see-through in it was laid on white" : ""}`);
}

async function chooseMask(file) {
  const mask = await readPicture(file);
  const { width, height } = state.photo;
  if (mask.width !== width || mask.height !== height) {
    throw new Error(`the mask has ${mask.width}x${mask.height} pixels; expected the photograph's ${width}x${height}`);
  }
  remember();
  const drawn = pen.createImageData(width, height);
  for (let at = 0; at < mask.data.length; at += 4) {
    if ((mask.data[at] + mask.data[at + 1] + mask.data[at + 2]) / 3 >= 128) paintPixel(drawn.data, at);
  }
  pen.putImageData(drawn, 0, 0);
  showPhoto();
}

// The mask: what is opaque in the upper canvas is missing

function colour() {
  return getComputedStyle(document.documentElement).getPropertyValue("--hole").trim();
}

function paintPixel(data, at) {
  const number = parseInt(colour().slice(1), 16);
  data.set([number >> 16, (number >> 8) & 255, number & 255, 255], at);
}

function brush() {
  const { width, height } = state.photo;
  return Math.max(2, Math.round(Math.max(width, height) * 0.3 * (find("size").value / 100) ** 2));
}

function showSize() {
  find("size-shown").textContent = state.photo ? `${brush()} pixels` : "";
}

function remember() {
  state.undo.push(pen.getImageData(0, 0, holes.width, holes.height));
  if (state.undo.length * holes.width * holes.height > 6e7) state.undo.shift();
}

function place(event) {
  const box = holes.getBoundingClientRect();
  const scale = holes.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function stroke(event) {
  const [x, y] = place(event);
  const [fromX, fromY] = state.stroke ?? [x, y];
  pen.globalCompositeOperation = find("tools").querySelector(":checked").value === "erase" ? "destination-out" : "source-over";
  pen.strokeStyle = colour();
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = brush();
  pen.beginPath();
  pen.moveTo(fromX, fromY);
  pen.lineTo(x, y + 0.01);
  pen.stroke();
  state.stroke = [x, y];
}

function endStroke() {
  if (!state.stroke) return;
  state.stroke = null;
  update();
}

// Filling

function showPhoto() {
  holes.hidden = false;
  find("compare").setAttribute("aria-pressed", "false");
  look.putImageData(state.photo, 0, 0);
  state.filled = null;
  update();
}

function fill() {
  const { width, height, data } = state.photo;
  const drawn = pen.getImageData(0, 0, width, height).data;
  const missing = Uint8Array.from({ length: width * height }, (_, at) => (drawn[4 * at + 3] >= 128 ? 1 : 0));
  showPhoto();
  Object.assign(state, { busy: true, missing });
  say("filling");
  update();
  worker.postMessage({ pixels: data.slice(), missing, width, height });
}

async function show(pixels) {
  const { width, height, data } = state.photo;
  state.filled = new ImageData(pixels, width, height);
  look.putImageData(state.filled, 0, 0);
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(state.filled, 0, 0);
  const file = await canvas.convertToBlob({ type: "image/png" });
  const again = (await readPicture(file)).data; // what is handed out is what the file holds
  const isSame = state.missing.every((hole, at) => hole || [0, 1, 2].every((one) => again[4 * at + one] === data[4 * at + one]));
  URL.revokeObjectURL(state.address);
  state.address = URL.createObjectURL(file);
  Object.assign(find("download"), { href: state.address, download: `${state.name}-filled.png` });
  holes.hidden = true;
  finish(() => {
    if (isSame) say("filled; outside the hole every pixel is the photograph's");
    else say("filled; this browser changes pixels when it writes a picture, also outside the hole", true);
  });
}

function compare() {
  const isBefore = find("compare").getAttribute("aria-pressed") !== "true";
  find("compare").setAttribute("aria-pressed", isBefore);
  look.putImageData(isBefore ? state.photo : state.filled, 0, 0);
}

// What a person does

const trying = (act) => (file) => {
  if (file) act(file).then(update, (error) => finish(() => say(error.message, true)));
};
const photoChosen = trying(choosePhoto);
const maskChosen = trying(chooseMask);
for (const [name, chosen] of Object.entries({ photo: photoChosen, mask: maskChosen })) {
  find(name).onchange = ({ target }) => {
    const [file] = target.files;
    target.value = ""; // so that the same file can be chosen again
    chosen(file);
  };
}
find("fill").onclick = fill;
find("compare").onclick = compare;
find("size").oninput = showSize;
find("clear").onclick = () => {
  remember();
  pen.clearRect(0, 0, holes.width, holes.height);
  showPhoto();
};
find("undo").onclick = () => {
  pen.putImageData(state.undo.pop(), 0, 0);
  showPhoto();
};
holes.onpointerdown = (event) => {
  if (state.busy) return;
  holes.setPointerCapture(event.pointerId);
  remember();
  stroke(event);
};
holes.onpointermove = (event) => state.stroke && stroke(event);
holes.onpointerup = holes.onpointercancel = endStroke;
view.onpointerdown = () => state.filled && !state.busy && showPhoto(); // to paint more
const stage = find("stage");
stage.ondragover = (event) => {
  event.preventDefault();
  stage.classList.add("over");
};
stage.ondragleave = () => stage.classList.remove("over");
stage.ondrop = (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  if (!state.busy) photoChosen(event.dataTransfer.files[0]);
};
for (const [name, value] of Object.entries(metadata)) {
  find("facts").append(Object.assign(document.createElement("dt"), { textContent: name }));
  find("facts").append(Object.assign(document.createElement("dd"), { textContent: value }));
}
update();
const worker = await startWorker();
