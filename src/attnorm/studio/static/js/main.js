// Tabs, the theme, the help; each tab has a module of its own.

import { ApiError } from "./api.js";
import { el, toast } from "./dom.js";
import { initGenerate } from "./generate.js";
import { initHoles } from "./holes.js";
import { initLayer } from "./layer.js";
import { loadModels } from "./models.js";
import { initMorph } from "./morph.js";
import { initRuns } from "./runs.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = Object.fromEntries(tabs.map((tab) => [tab.getAttribute("aria-controls"), null]));
for (const name of Object.keys(panels)) panels[name] = document.getElementById(name);

export function open(name, { focus = false } = {}) {
  if (!panels[name]) name = "generate";
  for (const tab of tabs) {
    const is = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(is));
    tab.tabIndex = is ? 0 : -1;
    if (is && focus) tab.focus();
    if (is) tab.parentElement.scrollLeft = tab.offsetLeft - tab.parentElement.offsetLeft - 40; // where they do not fit
  }
  for (const [other, panel] of Object.entries(panels)) {
    if (panel.hidden !== (other !== name)) panel.dispatchEvent(new CustomEvent(other === name ? "opened" : "closed"));
    panel.hidden = other !== name;
  }
  if ("ready" in document.body.dataset) loadModels().catch(() => {}); // what is asked for next says what is wrong
  if (location.hash !== `#/${name}`) history.replaceState(null, "", `#/${name}`); // no element's id: nothing is scrolled to
}

tabs.forEach((tab, number) => {
  tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) open(tabs[(number + step + tabs.length) % tabs.length].getAttribute("aria-controls"), { focus: true });
  });
});
const asked = () => location.hash.slice(2);
addEventListener("hashchange", () => open(asked()));

const root = document.documentElement;
const stored = (() => { try { return localStorage.getItem("theme"); } catch { return null; } })();
const dark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = (name) => { root.dataset.theme = name; dispatchEvent(new Event("theme")); };
setTheme(stored ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* private windows */ }
});

const help = document.getElementById("help");
document.getElementById("help-button").addEventListener("click", () => help.showModal());
addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input:not([type=range]):not([type=checkbox]):not([type=radio]), select, textarea, dialog");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") help.showModal();
  const tab = tabs[Number(event.key) - 1];
  if (tab) open(tab.getAttribute("aria-controls"), { focus: true });
});

initGenerate(panels.generate, open);
initMorph(panels.morph);
initLayer(panels.layer);
initHoles(panels.holes);
initRuns(panels.runs);
open(asked());
try {
  await loadModels();
} catch (error) {
  if (!(error instanceof ApiError)) throw error;
  document.getElementById("main").prepend(el("p", { class: "problem", role: "alert" }, error.message));
  toast(error.message);
}
document.body.dataset.ready = "";
