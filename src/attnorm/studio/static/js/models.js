// Models at hand, and the fields that choose among them.

import { call } from "./api.js";
import { el, part } from "./dom.js";

export const known = { models: [], methods: {}, examples: [], limits: {} };

// What is at hand now: runs get checkpoints, and there are new ones.
export async function loadModels() {
  const before = JSON.stringify(known);
  Object.assign(known, await call("/api/models"));
  if (JSON.stringify(known) === before) return;
  for (const select of document.querySelectorAll("select[data-task]")) fillModels(select);
  dispatchEvent(new Event("models"));
}

export const modelOf = (name) => known.models.find((model) => model.id === name);
export const describe = (model) => [model.preset || model.source, model.image_size && `${model.image_size} px`].filter(Boolean).join(", ");

function fillModels(select) {
  const fitting = known.models.filter((model) => model.task === select.dataset.task && (!("needsLayer" in select.dataset) || model.entities));
  const chosen = select.value;
  select.replaceChildren(...fitting.map((model) => {
    const problem = model.problem ? `: ${model.problem}` : "";
    return el("option", { value: model.id, disabled: !!model.problem }, `${model.id} (${describe(model)})${problem}`);
  }));
  const usable = fitting.filter((model) => !model.problem);
  if (usable.some((model) => model.id === chosen)) select.value = chosen;
  else if (usable.length) select.value = usable[0].id;
  const form = select.closest("form");
  const missing = form.querySelector("[data-missing]");
  missing?.remove();
  form.querySelector(".primary").disabled = !usable.length;
  if (!usable.length) {
    const what = "needsLayer" in select.dataset ? "There is no generator with the layer" : "There is no generator yet";
    select.parentElement.after(el("p", { class: "problem", "data-missing": "" }, `${what}. Start the studio with a run directory of one: attnorm studio RUN`));
  }
  const about = form.querySelector("[data-about]") ?? el("p", { class: "note", "data-about": "" });
  select.parentElement.after(about);
  select.onchange = () => (about.textContent = modelOf(select.value)?.about ?? "");
  if (!chosen || select.value !== chosen) select.dispatchEvent(new Event("change")); // else classes stay as chosen
}

export function fillClasses(select, model, chosen = select.value) {
  select.replaceChildren(...(model?.classes ?? []).map((name, number) => el("option", { value: String(number) }, name)));
  if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
}

// A button that draws another seed, in every panel.
export function dice(panel, then = () => {}) {
  part(panel, "dice").addEventListener("click", () => {
    panel.querySelector("[name=seed]").value = Math.floor(Math.random() * 2 ** 31);
    then();
  });
}
