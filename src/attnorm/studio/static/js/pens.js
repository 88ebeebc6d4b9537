// From pointers, the wheel and keys to strokes on the mask and moves of the view.

export class Pens {
  // `after(box)` is called when a step has ended; `moved(point)` when the pointer is elsewhere.
  constructor(view, editor, { after, moved, run }) {
    Object.assign(this, { view, editor, after, moved, run, tool: "brush", radius: 12, pointers: new Map(), stroke: null, times: [] });
    const { canvas } = view;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => { if (!this.stroke) { view.cursor = null; view.draw(); moved(null); } });
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { if (this.isPenDown) this.lift(); });
    addEventListener("keydown", (event) => { if (event.key === " " && event.target === canvas) { this.isSpace = true; event.preventDefault(); } });
    addEventListener("keyup", (event) => { if (event.key === " ") this.isSpace = false; });
  }

  place(event) {
    const box = this.view.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  get isRound() { return this.tool === "brush" || this.tool === "eraser"; }
  get value() { return this.tool === "eraser" ? 0 : 1; }
  setCursor(at) {
    const { view } = this;
    view.cursor = at && { at, radius: this.isRound ? this.radius : 0, isDown: !!this.stroke };
    view.draw();
  }

  down(event) {
    const { view } = this;
    if (!view.mask) return;
    view.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.place(event));
    if (this.pointers.size > 1) return this.drop(); // two fingers zoom and drag, more do nothing
    if (event.button === 1 || this.isSpace) {
      this.isPanning = true;
      this.editor.classList.add("panning");
      event.preventDefault();
      return;
    }
    if (event.button !== 0) return;
    this.begin(view.toPhotograph(...this.place(event)));
  }

  begin(at) {
    this.stroke = { from: at, last: at, points: [at] };
    this.extend(at);
  }

  // On with what has been begun, to a point of the photograph.
  extend(at) {
    const begun = performance.now();
    const { view, stroke } = this;
    if (this.isRound) {
      const box = view.mask.line(...stroke.last, ...at, this.radius, this.value);
      if (box) view.tint(box);
    } else if (this.tool === "rectangle") {
      const [[x0, y0], [x1, y1]] = [stroke.from, at];
      view.shape = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    } else {
      stroke.points.push(at);
      view.shape = stroke.points;
    }
    stroke.last = at;
    this.setCursor(at);
    this.times.push(performance.now() - begun);
  }

  end() {
    const { view, stroke } = this;
    if (!stroke) return;
    let box = null;
    if (this.tool === "rectangle") box = view.mask.rectangle(...stroke.from, ...stroke.last, 1);
    if (this.tool === "lasso" && stroke.points.length > 2) box = view.mask.polygon(stroke.points, 1);
    this.stroke = view.shape = null;
    if (box) view.tint(box);
    if (view.mask.commit()) this.after();
    view.draw();
  }

  drop() {
    if (!this.stroke) return;
    this.stroke = this.view.shape = null;
    const box = this.view.mask.dirty;
    this.view.mask.rollback();
    if (box) this.view.tint(box);
  }

  move(event) {
    const { view } = this;
    if (!view.mask) return;
    const was = this.pointers.get(event.pointerId);
    const now = this.place(event);
    if (was) this.pointers.set(event.pointerId, now);
    if (this.isPanning) return view.pan(now[0] - was[0], now[1] - was[1]);
    if (this.pointers.size === 2 && was) return this.pinch(event.pointerId, was, now);
    if (this.stroke) {
      const parts = event.getCoalescedEvents?.() ?? [];
      for (const part of parts.length ? parts : [event]) this.extend(view.toPhotograph(...this.place(part)));
    } else this.setCursor(view.toPhotograph(...now));
    this.moved(view.toPhotograph(...now));
  }

  pinch(pointer, was, now) {
    const [other] = [...this.pointers].filter(([id]) => id !== pointer).map(([, place]) => place);
    const apart = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]) || 1;
    // First to where the middle is now, then about it: what was between the fingers stays there.
    this.view.pan((now[0] - was[0]) / 2, (now[1] - was[1]) / 2);
    this.view.zoom(apart(now) / apart(was), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    if (this.isPanning) {
      this.isPanning = false;
      this.editor.classList.remove("panning");
    } else if (event.type === "pointercancel") this.drop();
    else if (!this.isPenDown) this.end();
  }

  wheel(event) {
    if (!this.view.mask) return;
    event.preventDefault();
    if (event.altKey || event.shiftKey) return this.resize(this.radius * Math.exp(-(event.deltaY || event.deltaX) / 400));
    this.view.zoom(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 500)), ...this.place(event));
  }

  resize(radius) {
    const { mask } = this.view;
    this.radius = Math.min(Math.max(radius, 0.5), mask ? Math.max(mask.width, mask.height) / 4 : 200);
    if (this.view.cursor) this.setCursor(this.view.cursor.at);
    this.resized?.();
  }

  // Arrow keys move the brush; Enter sets it down and lifts it.
  key(event) {
    const { view } = this;
    if (!view.mask || event.ctrlKey || event.metaKey) return;
    const step = (event.shiftKey ? 8 : 1) * Math.max(this.radius / 2, 2);
    const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    const at = view.cursor?.at ?? [view.mask.width / 2, view.mask.height / 2];
    if (move) {
      const to = [Math.min(Math.max(at[0] + move[0], 0), view.mask.width), Math.min(Math.max(at[1] + move[1], 0), view.mask.height)];
      if (this.isPenDown) this.extend(to);
      else this.setCursor(to);
      this.moved(to);
    } else if (event.key === "Enter" && !event.shiftKey) {
      if (this.isPenDown) this.lift();
      else { this.isPenDown = true; this.begin(at); }
    } else return;
    event.preventDefault();
  }

  lift() {
    this.isPenDown = false;
    this.end();
  }
}
