// Fills the holes of one photograph at a time, as attnorm's Inpainter does: what fits is seen whole; of a larger
// photograph each hole is seen in a window twice its size. Messages: {start} once, then {pixels, missing, width, height}.

let ort, session, meta, side, limit;

self.onmessage = async ({ data }) => {
  try {
    if (data.start) await start(data.start);
    else fill(data).then((pixels) => postMessage({ pixels }, [pixels.buffer]), fail);
  } catch (error) {
    fail(error);
  }
};

function fail(error) {
  postMessage({ error: error.message ?? `the runtime said ${error}` });
}

async function start({ runtime, wasm, model, metadata }) {
  ort = await import(URL.createObjectURL(new Blob([runtime], { type: "text/javascript" })));
  ort.env.wasm.numThreads = 1; // several need a server that isolates the page
  ort.env.wasm.wasmBinary = wasm;
  session = await ort.InferenceSession.create(model);
  meta = Object.fromEntries(Object.entries(metadata).map(([key, value]) => [key, Number(value)]));
  [side, limit] = [meta.image_size, 4 * meta.image_size ** 2];
  postMessage({ ready: true });
}

/** RGBA pixels and missing (1 a missing pixel, else 0), both of width x height -> RGBA pixels with the holes filled. */
async function fill({ pixels, missing, width, height }) {
  missing = missing.slice();
  const windows = findWindows(missing, width, height);
  for (const [number, { top, left, rows, columns, own }] of windows.entries()) {
    const seen = { rows, columns, pixels: new Uint8ClampedArray(4 * rows * columns), missing: new Uint8Array(rows * columns) };
    for (let row = 0; row < rows; row++) {
      const begin = (top + row) * width + left;
      seen.pixels.set(pixels.subarray(4 * begin, 4 * (begin + columns)), 4 * row * columns);
      seen.missing.set(missing.subarray(begin, begin + columns), row * columns);
    }
    const made = await look(seen);
    for (const place of own) {
      const from = (Math.floor(place / width) - top) * columns + (place % width) - left;
      for (let channel = 0; channel < 3; channel++) pixels[4 * place + channel] = made[4 * from + channel];
      pixels[4 * place + 3] = 255;
      missing[place] = 0;
    }
    postMessage({ done: number + 1, of: windows.length });
  }
  return pixels;
}

/** What the network makes of a window, RGBA, reduced for it where it is large, and enlarged again. */
async function look({ rows, columns, pixels, missing }) {
  const scale = Math.min(1, Math.sqrt(limit / (rows * columns)));
  const height = scale < 1 ? Math.max(Math.floor((rows * scale) / 8) * 8, meta.least_side) : rows;
  const width = scale < 1 ? Math.max(Math.floor((columns * scale) / 8) * 8, meta.least_side) : columns;
  const image = new Float32Array(3 * height * width);
  const mask = new Float32Array(height * width);
  for (let row = 0; row < height; row++) {
    const [top, bottom] = span(row, rows, height);
    for (let column = 0; column < width; column++) {
      const [left, right] = span(column, columns, width);
      const sums = [0, 0, 0];
      let hidden = false;
      for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) {
          const place = y * columns + x;
          hidden ||= missing[place] === 1;
          for (let channel = 0; channel < 3; channel++) sums[channel] += pixels[4 * place + channel];
        }
      }
      const to = row * width + column;
      mask[to] = hidden ? meta.mask_missing : meta.mask_known;
      for (let channel = 0; channel < 3 && !hidden; channel++) {
        const mean = sums[channel] / ((bottom - top) * (right - left));
        image[channel * height * width + to] = mean / meta.pixel_scale + meta.pixel_offset;
      }
    }
  }
  if (!mask.includes(meta.mask_known)) throw new Error("too little is known around a hole; paint less at once");
  const { filled } = await session.run({
    image: new ort.Tensor("float32", image, [1, 3, height, width]),
    mask: new ort.Tensor("float32", mask, [1, 1, height, width]),
  });
  return enlarge(filled.data, height, width, rows, columns);
}

/** First and last (exclusive) of the pixels that the reduced pixel `index` is the mean of. */
function span(index, from, to) {
  return [Math.floor((index * from) / to), Math.ceil(((index + 1) * from) / to)];
}

/** Values [3, height, width] of the network as RGBA of rows x columns, between its pixels by straight lines. */
function enlarge(values, height, width, rows, columns) {
  const out = new Uint8ClampedArray(4 * rows * columns);
  for (let row = 0; row < rows; row++) {
    const [top, bottom, down] = between(row, rows, height);
    for (let column = 0; column < columns; column++) {
      const [left, right, along] = between(column, columns, width);
      for (let channel = 0; channel < 3; channel++) {
        const at = (y, x) => values[(channel * height + y) * width + x];
        const upper = at(top, left) * (1 - along) + at(top, right) * along;
        const lower = at(bottom, left) * (1 - along) + at(bottom, right) * along;
        const value = upper * (1 - down) + lower * down;
        out[4 * (row * columns + column) + channel] = (value - meta.pixel_offset) * meta.pixel_scale;
      }
    }
  }
  return out;
}

function between(index, from, to) {
  const place = Math.min(Math.max(((index + 0.5) * to) / from - 0.5, 0), to - 1);
  const first = Math.floor(place);
  return [first, Math.min(first + 1, to - 1), place - first];
}

/** Where the network looks, in reading order, and which pixels (their places) it fills there. */
function findWindows(missing, width, height) {
  const all = [];
  for (let place = 0; place < missing.length; place++) if (missing[place]) all.push(place);
  if (!all.length || all.length === missing.length) throw new Error("paint over some of the photograph, not over all of it");
  if (width * height <= limit) return [{ top: 0, left: 0, rows: height, columns: width, own: all }];
  return findHoles(missing, all, width, height)
    .flatMap((hole) => cutThin(hole, width, height))
    .map((own) => ({ ...windowAround(own, width, height), own }));
}

/** The pixels of each hole; such as touch at a corner are one. */
function findHoles(missing, all, width, height) {
  const seen = new Uint8Array(missing.length);
  const holes = [];
  for (const first of all) {
    if (seen[first]) continue;
    const hole = [first];
    seen[first] = 1;
    for (let next = 0; next < hole.length; next++) {
      const [row, column] = [Math.floor(hole[next] / width), hole[next] % width];
      for (let y = Math.max(row - 1, 0); y <= Math.min(row + 1, height - 1); y++) {
        for (let x = Math.max(column - 1, 0); x <= Math.min(column + 1, width - 1); x++) {
          const place = y * width + x;
          if (!missing[place] || seen[place]) continue;
          seen[place] = 1;
          hole.push(place);
        }
      }
    }
    holes.push(hole);
  }
  return holes;
}

/** A hole that is wide, but nowhere as thick as those of training (a wire, a scratch), in squares; else as it is. */
function cutThin(hole, width, height) {
  const { rows, columns } = windowAround(hole, width, height);
  if (rows * columns <= limit) return [hole];
  const edge = side / 2;
  const thickness = new Map(); // the side of the largest square that ends at a pixel
  for (const place of hole.slice().sort((a, b) => a - b)) {
    const near = [place - 1, place - width, place - width - 1].map((other) => thickness.get(other) ?? 0);
    const thick = place % width ? 1 + Math.min(...near) : 1;
    if (thick >= edge) return [hole];
    thickness.set(place, thick);
  }
  const squares = new Map();
  for (const place of hole) {
    const name = Math.floor(Math.floor(place / width) / edge) * width + Math.floor((place % width) / edge);
    if (!squares.has(name)) squares.set(name, []);
    squares.get(name).push(place);
  }
  return [...squares.keys()].sort((a, b) => a - b).map((name) => squares.get(name));
}

/** Twice as high and as wide as the hole, at least as training's squares, moved into the photograph. */
function windowAround(hole, width, height) {
  let [top, left, bottom, right] = [height, width, 0, 0];
  for (const place of hole) {
    const [row, column] = [Math.floor(place / width), place % width];
    [top, bottom] = [Math.min(top, row), Math.max(bottom, row + 1)];
    [left, right] = [Math.min(left, column), Math.max(right, column + 1)];
  }
  const [first, rows] = along(top, bottom, height);
  const [begin, columns] = along(left, right, width);
  return { top: first, left: begin, rows, columns };
}

function along(start, stop, length) {
  const extent = stop - start;
  const wanted = Math.max(extent + Math.max(extent, side / 4), side);
  const size = Math.min(Math.ceil(wanted / 8) * 8, length);
  return [Math.min(Math.max(Math.floor((start + stop - size) / 2), 0), length - size), size];
}
