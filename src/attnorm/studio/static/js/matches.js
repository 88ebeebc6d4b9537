// What a hole is matched with. By AN: pixels that the layer gives to the same entities as the one under the brush, or as the
// hole. By contextual attention: the patches from which the one under the brush, or the hole, has been rebuilt.

import { el, framed, part, percent } from "./dom.js";
import { Maps, colourOf, glow } from "./maps.js";

export class Matches {
  constructor(panel, view) {
    Object.assign(this, { panel, view, views: [] });
    this.box = part(panel, "layout");
    this.box.addEventListener("change", () => this.point(this.at ?? null));
    this.point = framed((at) => this.draw(at));
  }

  // The layouts that came with a result, or none, and why.
  show(result, why = "") {
    this.why = why;
    this.views = (result?.views ?? []).map((view) => ({ box: view.box, maps: new Maps(view.maps), patches: view.patches }));
    this.photograph = result?.photograph;
    part(this.panel, "layout-label").hidden = !this.views.length;
    if (!this.views.length) this.box.checked = false;
    this.holes = this.views.map((view) => this.weightsOfHole(view));
    this.draw(null);
  }

  // Mean shares of the entities over the missing pixels that a window shows; of its patches each counts alike.
  weightsOfHole({ box: [top, left, bottom, right], maps, patches }) {
    if (patches) return new Float32Array(patches.length).fill(1 / patches.length);
    const { mask } = this.view;
    const weights = new Float32Array(maps.entities);
    let count = 0;
    for (let p = 0; p < maps.area; p++) {
      const x = Math.floor(left + ((p % maps.width) + 0.5) * ((right - left) / maps.width));
      const y = Math.floor(top + (Math.floor(p / maps.width) + 0.5) * ((bottom - top) / maps.height));
      if (!mask.data[y * mask.width + x]) continue;
      count++;
      for (let k = 0; k < maps.entities; k++) weights[k] += maps.share(k, p);
    }
    return weights.map((weight) => weight / Math.max(count, 1));
  }

  draw(at) {
    this.at = at;
    const said = part(this.panel, "matched");
    if (!this.box.checked || !this.views.length) {
      if (this.view.over) { this.view.over = null; this.view.draw(); }
      return void said.replaceChildren(this.why);
    }
    const inside = ({ box: [top, left, bottom, right] }) => at && at[0] >= left && at[0] < right && at[1] >= top && at[1] < bottom;
    const number = Math.max(this.views.findIndex(inside), 0);
    const { box, maps, patches } = this.views[number];
    const [top, left, bottom, right] = box;
    const pixel = inside(this.views[number]) ? maps.at((at[0] - left) / (right - left), (at[1] - top) / (bottom - top)) : null;
    const isPoint = pixel !== null && (!patches || patches.includes(pixel));
    const weights = !isPoint ? this.holes[number] : patches ? Float32Array.from(patches, (patch) => Number(patch === pixel)) : maps.weightsAt(pixel);
    this.view.over = { box, canvas: glow(maps, maps.likeness(weights)) };
    this.view.draw();
    if (patches) return void said.replaceChildren(`${isPoint ? "Under the brush" : "The hole"}: rebuilt from what is lit up`);
    const best = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3);
    const parts = best.flatMap((k) => {
      const swatch = el("i");
      swatch.style.background = colourOf(k);
      return [swatch, `entity ${k} ${percent(weights[k])}  `];
    });
    said.replaceChildren(isPoint ? "Under the brush: " : "The hole: ", ...parts, "(lit up: what has the same entities)");
  }
}
