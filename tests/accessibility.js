// Basics of accessibility, as the body of a function: a list of faults, empty if there are none.
const faults = [];
const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
const where = (e) => `<${e.tagName.toLowerCase()}${e.id ? ` #${e.id}` : ""} ${(e.textContent || "").trim().slice(0, 30)}>`;
const fault = (e, what) => faults.push(`${where(e)}: ${what}`);

if (!document.documentElement.lang) faults.push("the page has no language");
if (!document.title) faults.push("the page has no title");
if (document.querySelectorAll("main").length !== 1) faults.push("there is not one main");
if (document.querySelectorAll("h1").length !== 1) faults.push("there is not one h1");

const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
ids.filter((id, i) => ids.indexOf(id) !== i).forEach((id) => faults.push(`the id ${id} is there twice`));
for (const attribute of ["for", "aria-labelledby"]) {
  for (const e of document.querySelectorAll(`[${attribute}]`)) {
    for (const id of e.getAttribute(attribute).split(" ")) if (!ids.includes(id)) fault(e, `${attribute} names no element`);
  }
}
let level = 0;
for (const e of document.querySelectorAll("h1, h2, h3, h4")) {
  const now = Number(e.tagName[1]);
  if (now > level + 1) fault(e, "a level of headings is left out");
  level = now;
}
for (const e of document.querySelectorAll("img")) if (!e.hasAttribute("alt")) fault(e, "an image has no alternative text");
for (const e of document.querySelectorAll("a[href], button, input, select, textarea, [role=button], [tabindex='0']")) {
  if (!shown(e) || e.type === "hidden") continue;
  const labels = [...(e.labels ?? [])].map((l) => l.textContent).join("");
  if (!(e.getAttribute("aria-label") || labels || e.textContent || "").trim()) fault(e, "a control has no name");
}
for (const e of document.querySelectorAll("button button, button a, a button, [role=img] [tabindex], [role=img] button")) {
  fault(e, "a control is inside another");
}
for (const e of document.querySelectorAll("svg")) {
  if (shown(e) && !e.closest("[aria-hidden=true]") && !e.getAttribute("aria-label")) fault(e, "a drawing has no name");
}
for (const e of document.querySelectorAll("thead th")) if (!e.scope) fault(e, "a header has no scope");

// Contrast of every visible text with what is behind it.
const parse = (color) => {
  const found = color.match(/[\d.]+/g)?.map(Number);
  return found && { rgb: found.slice(0, 3), alpha: found[3] ?? 1 };
};
const light = ({ rgb }) => {
  const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (e) => {
  for (let at = e; at; at = at.parentElement) {
    const color = parse(getComputedStyle(at).backgroundColor);
    if (color && color.alpha === 1) return color;
  }
  return { rgb: [255, 255, 255] };
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const seen = new Set();
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const e = node.parentElement;
  if (!node.textContent.trim() || seen.has(e) || e.closest("script, style, noscript, option") || !shown(e)) continue;
  seen.add(e);
  const style = getComputedStyle(e), drawn = e instanceof SVGElement;
  const color = parse(drawn ? style.fill : style.color);
  let back = behind(e);
  if (e.classList.contains("digit")) back = parse(getComputedStyle(e.previousElementSibling).fill);
  if (!color || e.closest(":disabled")) continue;
  const [high, low] = [light(color), light(back)].sort((a, b) => b - a);
  const contrast = (high + 0.05) / (low + 0.05);
  const needed = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
  if (contrast < needed) fault(e, `contrast is ${contrast.toFixed(2)}, not ${needed}`);
}
return faults;
