// Small helpers. Whatever comes from files or people is put in as text, never as markup.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// The element of a panel that carries a data attribute: part(panel, "results").
export const part = (panel, name) => panel.querySelector(`[data-${name}]`);

export function toast(message) {
  const node = el("div", { class: "toast", role: "status" }, message);
  document.getElementById("toasts").append(node);
  setTimeout(() => node.remove(), 6000);
}

export function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

export const saveJson = (value, name) =>
  save(new Blob([JSON.stringify(value, null, 2)], { type: "application/json" }), name);

export function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

export const pngBlob = (base64, type = "image/png") => new Blob([bytesOf(base64)], { type });
export const pngUrl = (base64) => `data:image/png;base64,${base64}`;

export async function bitmapOf(base64) {
  return createImageBitmap(pngBlob(base64));
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

// At most one call a frame, with the latest arguments.
export function framed(draw) {
  let waiting = null;
  return (...latest) => {
    if (waiting) return void (waiting.latest = latest);
    waiting = { latest };
    requestAnimationFrame(() => {
      const call = waiting;
      waiting = null;
      draw(...call.latest);
    });
  };
}
