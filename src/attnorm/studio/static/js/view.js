// The photograph on a canvas: zoom and pan, the mask's colour over it, before and after, the brush's ring.

import { framed } from "./dom.js";

const MASK = [224, 17, 95, 150];

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.scale = 1; // CSS pixels a pixel of the photograph
    [this.x, this.y] = [0, 0]; // of the photograph's corner, in CSS pixels
    this.divide = 0.5; // of the canvas's width; left of it is `before`
    this.times = []; // of drawing, in milliseconds
    this.draw = framed(() => this.render());
    new ResizeObserver(() => { this.resize(); }).observe(canvas);
  }

  // `before` is the photograph as shown, perhaps reduced; the mask is of the photograph's own size. Later may come `fine`,
  // not reduced; and `after` and `left`, each with a `patch` and its `box`: top, left, bottom, right.
  show(before, mask) {
    Object.assign(this, { before, mask, fine: null, after: null, left: null, over: null, cursor: null });
    this.overlay = new OffscreenCanvas(before.width, before.height);
    this.tinted = this.overlay.getContext("2d");
    this.tint();
    this.fit();
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    const ratio = devicePixelRatio || 1;
    const before = [this.wide, this.high];
    [this.wide, this.high] = [clientWidth, clientHeight];
    [this.canvas.width, this.canvas.height] = [Math.round(clientWidth * ratio), Math.round(clientHeight * ratio)];
    if (this.before && (!before[0] || this.isFitting)) this.fit();
    this.render();
  }

  fit() {
    if (!this.mask || !this.wide) return;
    this.scale = Math.min((this.wide - 24) / this.mask.width, (this.high - 24) / this.mask.height, 12);
    this.x = (this.wide - this.scale * this.mask.width) / 2;
    this.y = (this.high - this.scale * this.mask.height) / 2;
    this.isFitting = true;
    this.draw();
  }

  zoom(factor, x = this.wide / 2, y = this.high / 2) {
    if (!this.mask) return;
    const scale = Math.min(40, Math.max(0.02, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.isFitting = false;
    this.draw();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.isFitting = false;
    this.draw();
  }

  // From CSS pixels of the canvas to the photograph's, and back.
  toPhotograph(x, y) { return [(x - this.x) / this.scale, (y - this.y) / this.scale]; }

  // Colours the overlay anew where the mask has changed: left, top, right, bottom, or everywhere.
  tint([left, top, right, bottom] = [0, 0, this.mask.width, this.mask.height]) {
    const { mask, overlay } = this;
    const [sx, sy] = [mask.width / overlay.width, mask.height / overlay.height];
    const x0 = Math.max(Math.floor(left / sx) - 1, 0);
    const y0 = Math.max(Math.floor(top / sy) - 1, 0);
    const wide = Math.min(Math.ceil(right / sx) + 1, overlay.width) - x0;
    const high = Math.min(Math.ceil(bottom / sy) + 1, overlay.height) - y0;
    if (wide < 1 || high < 1) return;
    const picture = new ImageData(wide, high);
    const words = new Uint32Array(picture.data.buffer);
    const colour = (MASK[3] << 24 | MASK[2] << 16 | MASK[1] << 8 | MASK[0]) >>> 0;
    const columns = Int32Array.from({ length: wide }, (_, x) => Math.min(Math.floor((x0 + x + 0.5) * sx), mask.width - 1));
    for (let y = 0; y < high; y++) {
      const row = Math.min(Math.floor((y0 + y + 0.5) * sy), mask.height - 1) * mask.width;
      for (let x = 0; x < wide; x++) if (mask.data[row + columns[x]]) words[y * wide + x] = colour;
    }
    this.tinted.putImageData(picture, x0, y0);
    this.draw();
  }

  render() {
    const begun = performance.now();
    const { context, canvas, mask } = this;
    const ratio = this.wide ? canvas.width / this.wide : 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.wide, this.high);
    if (!mask) return;
    const wide = mask.width * this.scale;
    const photograph = this.fine && wide * ratio > this.before.width ? this.fine : this.before;
    context.imageSmoothingEnabled = this.scale * (mask.width / photograph.width) < 3;
    context.imageSmoothingQuality = "medium"; // with less, what is much reduced is ragged
    const place = (picture, [top, left, bottom, right] = [0, 0, mask.height, mask.width]) =>
      context.drawImage(picture, this.x + left * this.scale, this.y + top * this.scale, (right - left) * this.scale, (bottom - top) * this.scale);
    place(photograph);
    if (this.after && !this.isPeeking) {
      const cut = this.wide * this.divide;
      if (this.left) this.clipped(0, cut, () => place(this.left.patch, this.left.box));
      this.clipped(cut, this.wide, () => place(this.after.patch, this.after.box));
    }
    if (!this.hidesMask && !this.isPeeking) place(this.overlay);
    if (this.over && !this.isPeeking) {
      context.imageSmoothingEnabled = true;
      place(this.over.canvas, this.over.box);
    }
    this.drawTools();
    this.times.push(performance.now() - begun);
    if (this.times.length > 1000) this.times.shift();
  }

  clipped(from, to, draw) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(from, 0, to - from, this.high);
    this.context.clip();
    draw();
    this.context.restore();
  }

  drawTools() {
    const { context, cursor, shape } = this;
    const outline = (path) => {
      for (const [colour, width] of [["#000a", 3], ["#fff", 1.25]]) {
        [context.strokeStyle, context.lineWidth] = [colour, width];
        context.beginPath();
        path();
        context.stroke();
      }
    };
    const to = ([x, y]) => [this.x + x * this.scale, this.y + y * this.scale];
    if (shape) {
      const points = shape.map(to);
      outline(() => { points.forEach(([x, y], number) => (number ? context.lineTo(x, y) : context.moveTo(x, y))); context.closePath(); });
    }
    if (!cursor) return;
    const [x, y] = to(cursor.at);
    if (cursor.radius) outline(() => context.arc(x, y, Math.max(cursor.radius * this.scale, 1.5), 0, 2 * Math.PI));
    if (!cursor.radius || cursor.isDown || cursor.radius * this.scale < 5)
      outline(() => { context.moveTo(x - 7, y); context.lineTo(x + 7, y); context.moveTo(x, y - 7); context.lineTo(x, y + 7); });
  }
}
