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
      for (let channel = 0; channel < 3; channel++) {
        pixels[4 * place + channel] = made[channel * rows * columns + from];
      }
      pixels[4 * place + 3] = 255;
      missing[place] = 0;
    }
    postMessage({ done: number + 1, of: windows.length });
  }
  return pixels;
}

/** What the network makes of a window, grey levels [3, rows, columns]: reduced for it where it is large, enlarged again,
 *  and without seams. */
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
  const { refined } = await session.run({
    image: new ort.Tensor("float32", image, [1, 3, height, width]),
    mask: new ort.Tensor("float32", mask, [1, 1, height, width]),
  });
  const made = enlarge(refined.data, height, width, rows, columns);
  takeOutSeams(made, pixels, missing, rows, columns);
  return made;
}

/** First and last (exclusive) of the pixels that the reduced pixel `index` is the mean of. */
function span(index, from, to) {
  return [Math.floor((index * from) / to), Math.ceil(((index + 1) * from) / to)];
}

/** Values [3, height, width] of the network as grey levels [3, rows, columns], between its pixels by straight lines. */
function enlarge(values, height, width, rows, columns) {
  const out = new Float32Array(3 * rows * columns);
  for (let row = 0; row < rows; row++) {
    const [top, bottom, down] = between(row, rows, height);
    for (let column = 0; column < columns; column++) {
      const [left, right, along] = between(column, columns, width);
      for (let channel = 0; channel < 3; channel++) {
        const at = (y, x) => values[(channel * height + y) * width + x];
        const upper = at(top, left) * (1 - along) + at(top, right) * along;
        const lower = at(bottom, left) * (1 - along) + at(bottom, right) * along;
        const value = upper * (1 - down) + lower * down;
        out[(channel * rows + row) * columns + column] = (value - meta.pixel_offset) * meta.pixel_scale;
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

// As attnorm's seams.py has it, and says why: the error beside the hole is continued into it and taken off. Maps have a
// border of nothing, so that each of their places has four neighbours.

const [SWEEPS, SWEEPS_OF_LARGE, LARGE, RELAXATION] = [16, 4, 2 ** 18, 1.75];
const [NOTHING, FIXED, FREE] = [0, 1, 2];

/** Shifts `made` [3, rows, columns] where pixels (RGBA) are missing, so that it meets those that are known. */
function takeOutSeams(made, pixels, missing, rows, columns) {
  let [top, left, bottom, right] = [rows, columns, 0, 0]; // of the hole and of what is beside it
  for (let place = 0; place < missing.length; place++) {
    if (!missing[place]) continue;
    const [row, column] = [Math.floor(place / columns), place % columns];
    [top, bottom] = [Math.min(top, Math.max(row - 1, 0)), Math.max(bottom, Math.min(row + 2, rows))];
    [left, right] = [Math.min(left, Math.max(column - 1, 0)), Math.max(right, Math.min(column + 2, columns))];
  }
  const [height, width] = [bottom - top, right - left];
  const stride = width + 2;
  const kinds = new Uint8Array((height + 2) * stride);
  const each = (visit) => { // place of the box: where it is in the map, and in the window
    for (let row = 0; row < height; row++) {
      const [at, place] = [(row + 1) * stride + 1, (top + row) * columns + left];
      for (let column = 0; column < width; column++) visit(at + column, place + column);
    }
  };
  each((at, place) => { if (missing[place]) kinds[at] = FREE; });
  each((at) => {
    if (kinds[at] === NOTHING && around(at, stride).some((other) => kinds[other] === FREE)) kinds[at] = FIXED;
  });
  for (let channel = 0; channel < 3; channel++) {
    const from = channel * rows * columns;
    const error = new Float32Array(kinds.length);
    each((at, place) => {
      if (kinds[at] === FIXED) error[at] = pixels[4 * place + channel] - made[from + place];
    });
    const shift = harmonic(error, kinds, height, width);
    each((at, place) => { if (kinds[at] === FREE) made[from + place] += shift[at]; });
  }
}

/** `values` where they are FIXED; where FREE, the mean of the neighbours that are either. From half the size up. */
function harmonic(values, kinds, height, width) {
  const stride = width + 2;
  const solution = new Float32Array(values.length);
  const places = [[], [], []]; // fixed, and free ones of both colours of a chessboard: none is its own colour's neighbour
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const at = (row + 1) * stride + column + 1;
      if (kinds[at] !== NOTHING) places[kinds[at] === FIXED ? 0 : 1 + ((row + column) % 2)].push(at);
    }
  }
  const [fixed, ...free] = places.map((list) => Int32Array.from(list));
  if (Math.max(height, width) > 2) {
    const [half, halfWidth] = [Math.ceil(height / 2), Math.ceil(width / 2)];
    const cell = (at) => ((Math.floor(at / stride) + 1) >> 1) * (halfWidth + 2) + (((at % stride) + 1) >> 1);
    const [coarse, counts, coarseKinds] = [Float32Array, Uint8Array, Uint8Array].map(
      (Kind) => new Kind((half + 2) * (halfWidth + 2)),
    );
    for (const part of free) for (const at of part) coarseKinds[cell(at)] = FREE;
    for (const at of fixed) {
      const to = cell(at);
      coarseKinds[to] = FIXED;
      coarse[to] += (values[at] - coarse[to]) / ++counts[to]; // the mean so far
    }
    const solved = harmonic(coarse, coarseKinds, half, halfWidth);
    for (const part of free) for (const at of part) solution[at] = solved[cell(at)];
  }
  for (const at of fixed) solution[at] = values[at];
  const counts = free.map((part) => part.map((at) => around(at, stride).filter((other) => kinds[other]).length || 1));
  for (let sweep = 0; sweep < (height * width < LARGE ? SWEEPS : SWEEPS_OF_LARGE); sweep++) {
    for (const [number, part] of free.entries()) {
      for (let index = 0; index < part.length; index++) {
        const at = part[index];
        const sum = solution[at - stride] + solution[at + stride] + solution[at - 1] + solution[at + 1];
        solution[at] += RELAXATION * (sum / counts[number][index] - solution[at]);
      }
    }
  }
  return solution;
}

/** The places above, below, to the left and to the right. */
function around(at, stride) {
  return [at - stride, at + stride, at - 1, at + 1];
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
