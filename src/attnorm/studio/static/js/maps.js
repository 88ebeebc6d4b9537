// Maps of entities: decoded, coloured, drawn. K entities, h x w pixels, 255 where all of a pixel is one's.

import { bytesOf } from "./dom.js";

// Twenty colours that neighbours in number differ in, on light and on dark.
const COLOURS = ["#2f7ed8", "#f2a65a", "#3aa655", "#d1495b", "#8d6fd1", "#a47148", "#e377c2", "#7f8c8d", "#c3c92e", "#22b8cf",
  "#9ec5f0", "#ffd6a5", "#a3dba8", "#f4a3ad", "#cbbcf0", "#d8bfa6", "#f5c2e3", "#c7cdce", "#e6e99a", "#a5e5ee"];
export const colourOf = (entity) => COLOURS[entity % COLOURS.length];
const RGB = COLOURS.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));

export class Maps {
  constructor({ entities, height, width, shares }) {
    Object.assign(this, { entities, height, width });
    this.area = height * width;
    this.shares = bytesOf(shares);
    this.winners = new Uint8Array(this.area);
    const best = this.shares.slice(0, this.area);
    for (let k = 1; k < entities; k++)
      for (let p = 0; p < this.area; p++) {
        const share = this.shares[k * this.area + p];
        if (share > best[p]) [best[p], this.winners[p]] = [share, k];
      }
  }

  // The pixel under a place given in shares of the width and the height.
  at(x, y) {
    const clip = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * size)));
    return clip(y, this.height) * this.width + clip(x, this.width);
  }

  share(entity, pixel) {
    return this.shares[entity * this.area + pixel] / 255;
  }

  range(entity) {
    const map = this.shares.subarray(entity * this.area, (entity + 1) * this.area);
    let [low, high] = [255, 0];
    for (const share of map) [low, high] = [Math.min(low, share), Math.max(high, share)];
    return [low, high];
  }

  // How alike pixels are to given weights of entities: sum over k of S_k(q) w_k, as shares of its maximum.
  likeness(weights) {
    const out = new Float32Array(this.area);
    for (let k = 0; k < this.entities; k++)
      if (weights[k] > 0) for (let p = 0; p < this.area; p++) out[p] += weights[k] * this.shares[k * this.area + p];
    const most = out.reduce((a, b) => Math.max(a, b), 1e-6);
    return out.map((value) => value / most);
  }

  weightsAt(pixel) {
    return Float32Array.from({ length: this.entities }, (_, k) => this.share(k, pixel));
  }
}

function paint(canvas, maps, colour) {
  if (canvas.width !== maps.width || canvas.height !== maps.height) [canvas.width, canvas.height] = [maps.width, maps.height];
  canvas.classList.add("tiny");
  const context = canvas.getContext("2d");
  const picture = context.createImageData(maps.width, maps.height);
  const { data } = picture;
  for (let p = 0, at = 0; p < maps.area; p++, at += 4) {
    const [red, green, blue, alpha = 255] = colour(p);
    data[at] = red;
    data[at + 1] = green;
    data[at + 2] = blue;
    data[at + 3] = alpha;
  }
  context.putImageData(picture, 0, 0);
}

const DIM = RGB.map((colour) => colour.map((part) => 0.25 * part + 30));

// The entity that wins each pixel; where one is lit, the others are dimmed.
export function drawWinners(canvas, maps, lit = null) {
  paint(canvas, maps, (p) => {
    const winner = maps.winners[p];
    return (lit === null || winner === lit ? RGB : DIM)[winner % RGB.length];
  });
}

// One entity's map, from black at `low` to white at `high`.
export function drawMap(canvas, maps, entity, [low, high] = maps.range(entity)) {
  const scale = 255 / Math.max(high - low, 1);
  paint(canvas, maps, (p) => {
    const grey = (maps.shares[entity * maps.area + p] - low) * scale;
    return [grey, grey, grey];
  });
}

// A canvas that hides all pixels but those that the entity wins, to lay over an image.
export function veil(maps, lit) {
  maps.veils ??= [];
  if (!maps.veils[lit]) {
    const canvas = (maps.veils[lit] = document.createElement("canvas"));
    paint(canvas, maps, (p) => (maps.winners[p] === lit ? CLEAR : VEIL));
  }
  return maps.veils[lit];
}

const CLEAR = [0, 0, 0, 0];
const VEIL = [10, 14, 16, 190];

// Warm where a share is high, transparent where it is low.
export function glow(maps, shares) {
  const canvas = document.createElement("canvas");
  paint(canvas, maps, (p) => [255, 190 - 120 * shares[p], 40, 215 * shares[p] ** 2]);
  return canvas;
}

// An image on a canvas of its own size, with something over it that is as large as it.
export function drawImage(canvas, image, over = null) {
  if (canvas.width !== image.width || canvas.height !== image.height) [canvas.width, canvas.height] = [image.width, image.height];
  canvas.classList.toggle("tiny", image.width <= 64);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  if (!over) return;
  context.imageSmoothingEnabled = false;
  context.drawImage(over, 0, 0, canvas.width, canvas.height);
}
