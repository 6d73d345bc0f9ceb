"use strict";
/* Shared by all charts: the embedded numbers, how they are written, and what is selected. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function unpack(text, Type) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Type(bytes.buffer);
}

/* ---- numbers as people read them (the same rules as words.py) ---- */

function number(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) {
    return value.toExponential(2).replace(/\.?0+e/, "e");
  }
  const decimals = Math.max(0, 2 - Math.floor(Math.log10(size)));
  return Number(value.toPrecision(3)).toFixed(decimals);
}

function withError(value, stderr) {
  if (!(stderr > 0)) return number(value);
  const leading = Math.floor(Math.log10(stderr));
  const decimals = Math.max(0, -leading + (stderr < 2 * 10 ** leading ? 1 : 0));
  if (decimals > 4) return `${number(value)} ± ${stderr.toExponential(0)}`;
  return `${value.toFixed(decimals)} ± ${stderr.toFixed(decimals)}`;
}

function bytesText(count) {
  if (count < 1000) return `${count} B`;
  let size = count, unit = "B";
  for (unit of ["kB", "MB", "GB", "TB"]) {
    size /= 1000;
    if (Math.round(size * 10) / 10 < 1000) break;
  }
  return `${size.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} ${unit}`;
}

const bpwOf = (bytes) => (8 * bytes) / DATA.weights;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

/* ---- units, formats, prices ---- */

const F = DATA.formats.length;
const NAMES = [];
for (const [shared, rest] of DATA.units.names) {
  NAMES.push((shared ? NAMES[NAMES.length - 1].slice(0, shared) : "") + rest);
}
const U = NAMES.length;
const SHAPE_OF = unpack(DATA.units.shape, Uint16Array);
const KIND_OF = unpack(DATA.units.kind, Int16Array);
const LAYER_OF = unpack(DATA.units.layer, Int16Array);
const PRICE = unpack(DATA.prices.kl, Uint16Array);
const PRICE_ERROR = unpack(DATA.prices.error, Uint8Array);
const ALLOWED = DATA.allowed && unpack(DATA.allowed, Uint8Array);
const CHARGES = DATA.charges && unpack(DATA.charges, Float32Array);
const PLAN = unpack(DATA.plan, Uint8Array);

const shapeOf = (u) => DATA.shapes[SHAPE_OF[u]];
const bytesOf = (u, f) => shapeOf(u).bytes[f];
const bitsOf = (u, f) => (8 * bytesOf(u, f)) / shapeOf(u).weights;

/* Predicted KL of one unit in one format, nats per token; NaN where it was not priced. */
function priceOf(u, f) {
  const code = PRICE[u * F + f];
  if (code < 2) return code ? 0 : NaN;
  return DATA.prices.low * Math.exp((code - 2) * DATA.prices.step);
}

function errorOf(u, f) {
  const code = PRICE_ERROR[u * F + f];
  return code ? priceOf(u, f) * DATA.prices.errorLow * Math.exp((code - 1) * DATA.prices.errorStep) : 0;
}

function isAllowed(u, f) {
  const at = u * F + f;
  return !ALLOWED || ((ALLOWED[at >> 3] >> (at & 7)) & 1) === 1;
}

/* ---- the frontier: every step, and the stops of the slider ---- */

const START = unpack(DATA.frontier.start, Uint8Array);
const STEP_UNIT = unpack(DATA.frontier.unit, DATA.frontier.wide ? Uint32Array : Uint16Array);
const STEP_FORMAT = unpack(DATA.frontier.format, Uint8Array);
const STOPS = unpack(DATA.frontier.stops, Uint32Array);
const STOP_BYTES = DATA.frontier.bytes;
const STOP_KL = DATA.frontier.kl;
const LAST_STOP = STOPS.length - 1;

/* The formats a unit takes along the frontier, and the step at which it takes each. */
function pathOf(u) {
  const path = [{ format: START[u], step: -1 }];
  for (let k = 0; k < STEP_UNIT.length; k++) {
    if (STEP_UNIT[k] === u) path.push({ format: STEP_FORMAT[k], step: k });
  }
  return path;
}

function lastWithin(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

/* The lower bound at a size: straight between the plans of the frontier. */
function boundAt(bytes) {
  const i = lastWithin(STOP_BYTES, bytes);
  if (i >= LAST_STOP || bytes <= STOP_BYTES[0]) return STOP_KL[i];
  const share = (bytes - STOP_BYTES[i]) / (STOP_BYTES[i + 1] - STOP_BYTES[i]);
  return STOP_KL[i] + share * (STOP_KL[i + 1] - STOP_KL[i]);
}

/* Nats that the last and the next byte buy at a stop of the slider. */
function rateAt(stop) {
  const step = STOPS[stop];
  if (step >= STEP_UNIT.length) return 0;
  const u = STEP_UNIT[step], to = STEP_FORMAT[step];
  const path = pathOf(u);
  const from = path[path.findIndex((p) => p.step === step) - 1].format;
  return (priceOf(u, from) - priceOf(u, to)) / (bytesOf(u, to) - bytesOf(u, from));
}

/* ---- what is shown: the plan of the run, or the optimal plan of another budget ---- */

const state = {
  stop: -1, // of the slider; -1 is the plan itself
  choice: PLAN,
  bytes: DATA.chart.plan.bytes,
  kl: DATA.chart.plan.kl,
  lambda: DATA.lambda, // nats per byte
  unit: 0,
};
const listeners = { budget: [], unit: [] };
const on = (what, listener) => listeners[what].push(listener);
const tell = (what) => listeners[what].forEach((listener) => listener());

function showPlan() {
  Object.assign(state, {
    stop: -1, choice: PLAN, bytes: DATA.chart.plan.bytes, kl: DATA.chart.plan.kl, lambda: DATA.lambda,
  });
  tell("budget");
}

function showStop(stop) {
  stop = Math.max(0, Math.min(LAST_STOP, stop));
  const choice = START.slice();
  for (let k = 0; k < STOPS[stop]; k++) choice[STEP_UNIT[k]] = STEP_FORMAT[k];
  Object.assign(state, {
    stop, choice, bytes: STOP_BYTES[stop], kl: STOP_KL[stop], lambda: rateAt(stop),
  });
  tell("budget");
}

function showUnit(u, scroll) {
  state.unit = u;
  tell("unit");
  if (scroll) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    byId("why").scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
    byId("unit").focus({ preventScroll: true });
  }
}

/* ---- drawing ---- */

const SVG = "http://www.w3.org/2000/svg";
function make(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  return fill(element, attributes, children);
}
function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
let printing = false;
const isDark = () => dark.matches && !printing;

/* A colour of a scale for a share between 0 and 1. Dark pages turn the scale of KL round, so that
   what matters stays what stands out. */
function rampColor(name, share) {
  const colors = DATA.ramps[name];
  const at = Math.max(0, Math.min(1, name === "kl" && isDark() ? 1 - share : share));
  return colors[Math.round(at * (colors.length - 1))];
}
function inkOn(color) {
  const part = (i) => {
    const value = parseInt(color.slice(i, i + 2), 16) / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  };
  const light = 0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5);
  return light > 0.179 ? "#000" : "#fff";
}
function rampStyle(name) {
  const stops = [...Array(9).keys()].map((i) => rampColor(name, i / 8));
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

const logScale = (low, high, from, to) => (value) =>
  from + ((Math.log(Math.max(value, low)) - Math.log(low)) / (Math.log(high) - Math.log(low))) * (to - from);
const linearScale = (low, high, from, to) => (value) =>
  from + ((value - low) / (high - low || 1)) * (to - from);

function linearTicks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12); i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(low, high, most) {
  for (const factors of [[1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const m of factors) {
        const value = Number(`${m}e${power}`);
        if (value >= low && value <= high) ticks.push(value);
      }
    }
    if (ticks.length <= most) return ticks;
    if (factors.length === 1) return ticks.filter((_, i) => i % Math.ceil(ticks.length / most) === 0);
  }
  return [];
}
const tickText = (value) => (value >= 1e6 || value < 1e-4) && value !== 0
  ? value.toExponential(0) : String(Number(value.toPrecision(6)));

const textWidth = (() => {
  const context = document.createElement("canvas").getContext("2d");
  return (text, size = 12) => {
    context.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
    return context.measureText(text).width;
  };
})();

/* Where a chart begins so that its ticks and the title of its axis have room. */
const gutter = (ticks) => 32 + Math.max(...ticks.map((tick) => textWidth(tickText(tick), 12)), 14);

/* Draw again whenever the place changes its width. */
function responsive(place, draw) {
  let width = 0;
  const redraw = () => {
    const now = Math.floor(place.clientWidth);
    if (now && now !== width) { width = now; draw(now); }
  };
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(place);
  redraw();
  return () => { if (width) draw(width); };
}

/* Arrow keys move among marks; Tab enters and leaves the whole group. */
function roving(group, marks, move, enter) {
  let current = 0;
  marks.forEach((mark, i) => mark.setAttribute("tabindex", i ? -1 : 0));
  const go = (i) => {
    if (i < 0 || i >= marks.length) return;
    marks[current].setAttribute("tabindex", -1);
    current = i;
    marks[i].setAttribute("tabindex", 0);
    marks[i].focus();
  };
  group.addEventListener("keydown", (event) => {
    const at = marks.indexOf(document.activeElement);
    if (at < 0) return;
    if (enter && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      enter(at);
      return;
    }
    const next = move(at, event.key);
    if (next !== null) { event.preventDefault(); go(next); }
  });
  group.addEventListener("focusin", (event) => {
    const at = marks.indexOf(event.target);
    if (at >= 0 && at !== current) {
      marks[current].setAttribute("tabindex", -1);
      current = at;
      marks[at].setAttribute("tabindex", 0);
    }
  });
}

/* One tooltip for the whole page. */
const tip = byId("tip");
function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((line, i) => html(i ? "span" : "strong", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(x + 14, document.documentElement.clientWidth - box.width - 8));
  const top = y - box.height - 12 < 4 ? y + 18 : y - box.height - 12;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${top + scrollY}px`;
}
function hideTip() { tip.hidden = true; }
function tipAt(element, lines) {
  const box = element.getBoundingClientRect();
  showTip(lines, box.left + box.width / 2, box.top);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, { passive: true });
