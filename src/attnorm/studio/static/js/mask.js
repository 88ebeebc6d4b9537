// What is missing, a byte a pixel (1: missing), with undo and redo of 100 steps. Nothing here knows of the page.

const STEPS = 100;

export class Mask {
  constructor(width, height) {
    Object.assign(this, { width, height, past: [], future: [], count: 0 });
    this.data = new Uint8Array(width * height);
    this.kept = new Uint8Array(width * height); // as it was after the last step
    this.dirty = null; // what may differ from that: left, top, right, bottom
  }

  touch(left, top, right, bottom) {
    left = Math.max(Math.floor(left), 0);
    top = Math.max(Math.floor(top), 0);
    right = Math.min(Math.ceil(right), this.width);
    bottom = Math.min(Math.ceil(bottom), this.height);
    if (left >= right || top >= bottom) return null;
    const box = [left, top, right, bottom];
    const old = this.dirty;
    this.dirty = old ? [Math.min(old[0], left), Math.min(old[1], top), Math.max(old[2], right), Math.max(old[3], bottom)] : box;
    return box;
  }

  // The pixels within `radius` of a segment; their centres are at halves.
  line(x0, y0, x1, y1, radius, value) {
    const box = this.touch(Math.min(x0, x1) - radius, Math.min(y0, y1) - radius, Math.max(x0, x1) + radius + 1, Math.max(y0, y1) + radius + 1);
    if (!box) return null;
    const [dx, dy] = [x1 - x0, y1 - y0];
    const length = dx * dx + dy * dy || 1;
    const reach = Math.max(radius, 0.71) ** 2; // a pixel at least
    for (let y = box[1]; y < box[3]; y++) {
      const py = y + 0.5 - y0;
      for (let x = box[0]; x < box[2]; x++) {
        const px = x + 0.5 - x0;
        const along = Math.min(1, Math.max(0, (px * dx + py * dy) / length));
        if ((px - along * dx) ** 2 + (py - along * dy) ** 2 <= reach) this.data[y * this.width + x] = value;
      }
    }
    return box;
  }

  rectangle(x0, y0, x1, y1, value) {
    const box = this.touch(Math.round(Math.min(x0, x1)), Math.round(Math.min(y0, y1)), Math.round(Math.max(x0, x1)), Math.round(Math.max(y0, y1)));
    if (box) for (let y = box[1]; y < box[3]; y++) this.data.fill(value, y * this.width + box[0], y * this.width + box[2]);
    return box;
  }

  // The inside of a closed line of points [x, y], by the even-odd rule at the centres of pixels.
  polygon(points, value) {
    const xs = points.map(([x]) => x);
    const ys = points.map(([, y]) => y);
    const bounds = [xs, ys].map((list) => [list.reduce((a, b) => Math.min(a, b)), list.reduce((a, b) => Math.max(a, b))]);
    const box = this.touch(bounds[0][0], bounds[1][0], bounds[0][1], bounds[1][1]);
    if (!box) return null;
    for (let y = box[1]; y < box[3]; y++) {
      const at = y + 0.5;
      const cuts = [];
      points.forEach(([x0, y0], number) => {
        const [x1, y1] = points[(number + 1) % points.length];
        if (y0 <= at !== y1 <= at) cuts.push(x0 + ((at - y0) / (y1 - y0)) * (x1 - x0));
      });
      cuts.sort((a, b) => a - b);
      for (let i = 0; i + 1 < cuts.length; i += 2) {
        const [from, to] = [Math.max(Math.ceil(cuts[i] - 0.5), 0), Math.min(Math.floor(cuts[i + 1] - 0.5) + 1, this.width)];
        if (from < to) this.data.fill(value, y * this.width + from, y * this.width + to);
      }
    }
    return box;
  }

  all(change) {
    this.touch(0, 0, this.width, this.height);
    for (let p = 0; p < this.data.length; p++) this.data[p] = change(this.data[p], p) ? 1 : 0;
  }

  clear() { this.all(() => 0); }
  invert() { this.all((is) => !is); }

  // By `steps` pixels on every side (negative: less), a square's maximum: rows, then columns.
  grow(steps) {
    const wanted = steps > 0 ? 1 : 0;
    const reach = Math.abs(steps);
    const pass = (source, count, length, stride, step) => {
      const out = source.slice();
      for (let row = 0; row < count; row++) {
        let last = -Infinity;
        for (let i = 0; i < length; i++) {
          const p = row * stride + i * step;
          if (source[p] === wanted) last = i;
          if (i - last <= reach) out[p] = wanted;
        }
        last = Infinity;
        for (let i = length - 1; i >= 0; i--) {
          const p = row * stride + i * step;
          if (source[p] === wanted) last = i;
          if (last - i <= reach) out[p] = wanted;
        }
      }
      return out;
    };
    const { width, height } = this;
    const grown = pass(pass(this.data, height, width, width, 1), width, height, 1, width);
    this.all((_, p) => grown[p]);
  }

  // Ends a step: what has changed since the last one can be undone. Returns whether anything had.
  commit() {
    if (!this.dirty) return false;
    const [left, top, right, bottom] = this.dirty;
    this.dirty = null;
    const runs = []; // from and to, of pixels that changed
    for (let y = top; y < bottom; y++) {
      for (let p = y * this.width + left, end = y * this.width + right; p < end; p++) {
        if (this.data[p] === this.kept[p]) continue;
        const from = p;
        while (p < end && this.data[p] !== this.kept[p]) {
          this.kept[p] = this.data[p];
          this.count += this.data[p] ? 1 : -1;
          p++;
        }
        if (runs.length && runs[runs.length - 1] === from) runs[runs.length - 1] = p;
        else runs.push(from, p);
      }
    }
    if (!runs.length) return false;
    this.past.push(Uint32Array.from(runs));
    if (this.past.length > STEPS) this.past.shift();
    this.future = [];
    return true;
  }

  // Takes back what has not been committed.
  rollback() {
    if (this.dirty) this.data.set(this.kept);
    this.dirty = null;
  }

  undo() { return this.flip(this.past, this.future); }
  redo() { return this.flip(this.future, this.past); }

  flip(from, to) {
    this.rollback();
    const runs = from.pop();
    if (!runs) return false;
    for (let i = 0; i < runs.length; i += 2)
      for (let p = runs[i]; p < runs[i + 1]; p++) {
        this.data[p] = this.kept[p] ^= 1;
        this.count += this.data[p] ? 1 : -1;
      }
    to.push(runs);
    return true;
  }

  get share() { return this.count / this.data.length; }

  // Left, top, right and bottom of what is missing; null of nothing.
  get box() {
    let [left, top, right, bottom] = [this.width, this.height, 0, 0];
    for (let y = 0; y < this.height; y++) {
      const first = this.data.indexOf(1, y * this.width);
      if (first < 0) break;
      if (first >= (y + 1) * this.width) { y = Math.floor(first / this.width) - 1; continue; }
      const last = this.data.lastIndexOf(1, (y + 1) * this.width - 1);
      [left, right] = [Math.min(left, first - y * this.width), Math.max(right, last - y * this.width + 1)];
      [top, bottom] = [Math.min(top, y), y + 1];
    }
    return this.count ? [left, top, right, bottom] : null;
  }

  // A PNG file, white where something is missing.
  async toBlob() {
    const canvas = new OffscreenCanvas(this.width, this.height);
    const context = canvas.getContext("2d");
    const rows = Math.max(1, Math.floor(4e6 / this.width)); // a strip at a time: four bytes a pixel are many
    for (let top = 0; top < this.height; top += rows) {
      const high = Math.min(rows, this.height - top);
      const picture = context.createImageData(this.width, high);
      const words = new Uint32Array(picture.data.buffer);
      for (let p = 0; p < words.length; p++) words[p] = this.data[top * this.width + p] ? 0xffffffff : 0xff000000;
      context.putImageData(picture, 0, top);
    }
    return canvas.convertToBlob({ type: "image/png" });
  }

  // Of a picture of the same size: missing where it is light.
  load(bitmap) {
    if (bitmap.width !== this.width || bitmap.height !== this.height)
      throw new RangeError(`The mask has ${bitmap.width}×${bitmap.height} pixels, the photograph ${this.width}×${this.height}.`);
    const context = new OffscreenCanvas(this.width, this.height).getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const { data } = context.getImageData(0, 0, this.width, this.height);
    const isLight = (p) => ((data[4 * p] * 299 + data[4 * p + 1] * 587 + data[4 * p + 2] * 114) * data[4 * p + 3]) / 255 >= 128000;
    this.all((_, p) => isLight(p));
  }
}
