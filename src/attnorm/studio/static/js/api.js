// Requests to the studio: errors in words, progress and cancel on anything longer.

import { el } from "./dom.js";

export class ApiError extends Error {}

export async function call(path, { json, form, signal, accept = "application/json", job } = {}) {
  const headers = { accept };
  if (job) headers["x-job"] = job;
  if (json) headers["content-type"] = "application/json";
  let answer;
  try {
    const asks = json || form;
    answer = await fetch(path, { method: asks ? "POST" : "GET", headers, body: json ? JSON.stringify(json) : form, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The studio does not answer. Is it still running in its terminal?");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new ApiError(told.error || `The studio answered ${answer.status}.`);
  }
  return accept === "application/json" ? answer.json() : answer;
}

const DELAY = 300; // milliseconds before progress is shown

// Runs `task(ask)` where `ask` is `call` with progress and a cancel button in `place`; one at a time in each place. How
// far it is, the studio is asked; a task of several requests says it by `ask.tell(done, total)`.
export async function work(place, what, task) {
  place.control?.abort();
  const control = new AbortController();
  place.control = control;
  const isCurrent = () => place.control === control;
  const button = place.closest("form")?.querySelector(".primary");
  const bar = el("progress", { "aria-label": what });
  const text = el("span", {}, `${what} …`);
  const cancel = el("button", { type: "button", onclick: () => control.abort() }, "Cancel");
  let timer = 0;
  let current = null;
  let isTold = false; // how far it is, by the task itself
  const tell = (done, total) => {
    [text.textContent, bar.max, bar.value] = [`${what}: ${done} of ${total}`, total, done];
  };
  const look = async () => {
    if (current) {
      const state = await fetch(`/api/jobs/${current}`).then((answer) => (answer.ok ? answer.json() : null), () => null);
      if (state?.before) text.textContent = `Waiting; ${state.before} before this`;
      else if (state?.total > 1 && !isTold) tell(state.done, state.total);
    }
    if (!control.isOver) timer = setTimeout(look, DELAY);
  };
  const show = setTimeout(() => {
    place.replaceChildren(el("div", { class: "work" }, text, cancel, bar));
    place.scrollIntoView({ block: "nearest" });
    look();
  }, DELAY);
  place.replaceChildren();
  place.setAttribute("aria-busy", "true");
  if (button) button.disabled = true;
  const ask = (path, options = {}) => {
    current = crypto.randomUUID?.() ?? `job-${Math.random().toString(36).slice(2)}${Date.now()}`;
    return call(path, { ...options, signal: control.signal, job: current });
  };
  ask.tell = (done, total) => {
    isTold = true;
    tell(done, total);
  };
  try {
    return await task(ask);
  } catch (error) {
    if (!isCurrent()) return;
    if (error.name === "AbortError") return void place.replaceChildren(el("p", { class: "note" }, "Cancelled."));
    const known = error instanceof ApiError;
    if (!known) console.error(error);
    place.replaceChildren(el("p", { class: "problem", role: "alert" }, known ? error.message : `This failed in the page: ${error.message}`));
    place.scrollIntoView({ block: "nearest" });
  } finally {
    clearTimeout(show);
    clearTimeout(timer);
    control.isOver = true;
    if (isCurrent()) {
      place.querySelector(".work")?.remove();
      place.removeAttribute("aria-busy");
      if (button) button.disabled = false;
    }
  }
}
