/* One number per unit: kinds of matrices in rows, layers in columns, and the units outside. */

const CELLS = []; // {kind, layer, units}
const CELL_AT = new Map();
const OTHERS = [];
for (let u = 0; u < U; u++) {
  if (LAYER_OF[u] < 0) { OTHERS.push(u); continue; }
  const key = KIND_OF[u] * DATA.layers.length + LAYER_OF[u];
  if (!CELL_AT.has(key)) {
    CELL_AT.set(key, CELLS.length);
    CELLS.push({ kind: KIND_OF[u], layer: LAYER_OF[u], units: [] });
  }
  CELLS[CELL_AT.get(key)].units.push(u);
}
const MOST_OTHERS = 400;

/* A grid or a list of everything there is.

   view.value(units) gives the number, view.color(value) its colour, view.text(units, value) what
   stands in a cell that has room, view.lines(units, value) what the tooltip says. */
class Grid {
  constructor(place, view) {
    this.place = place;
    this.view = view;
    this.redraw = responsive(place, (width) => this.draw(width));
  }

  draw(width) {
    this.cells = [];
    const parts = [];
    if (CELLS.length) parts.push(this.drawCells(width));
    if (OTHERS.length) parts.push(this.drawOthers());
    this.place.replaceChildren(...parts);
    this.update();
  }

  drawCells(width) {
    const rows = DATA.kinds.length, columns = DATA.layers.length;
    const narrow = width < 620;
    const label = narrow ? 0 : Math.min(230, Math.max(...DATA.kinds.map((k) => textWidth(k, 12.5))) + 14);
    const cellWidth = Math.min(40, (width - label - 2) / columns);
    const cellHeight = narrow ? 26 : 25, pitch = narrow ? cellHeight + 19 : cellHeight + 2;
    const top = narrow ? 17 : 2, height = top + rows * pitch + (narrow ? 20 : 32);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
      "aria-label": `${this.place.dataset.alt} Arrow keys move between the cells, Enter explains one.` });
    DATA.kinds.forEach((kind, row) => {
      const y = top + row * pitch;
      svg.append(make("text", narrow ? { x: 0, y: y - 4, class: "row" }
        : { x: label - 10, y: y + cellHeight / 2 + 4, "text-anchor": "end", class: "row" }, kind));
    });
    const step = [1, 2, 4, 5, 10, 20, 50].find((s) => s * cellWidth > 26) ?? 100;
    for (let column = 0; column < columns; column += step) {
      svg.append(make("text", { x: label + (column + 0.5) * cellWidth, y: top + rows * pitch + (narrow ? -4 : 14),
        "text-anchor": "middle", class: "axis" }, DATA.layers[column]));
    }
    if (!narrow) {
      svg.append(make("text", { x: label + (columns * cellWidth) / 2, y: height - 2, "text-anchor": "middle",
        class: "axis title" }, "layer"));
    }
    const gap = cellWidth > 6 ? 1.5 : 0.4;
    const group = make("g", {});
    const marks = CELLS.map((cell) => {
      const x = label + cell.layer * cellWidth, y = top + cell.kind * pitch;
      const mark = make("rect", { x: x + gap / 2, y, width: cellWidth - gap, height: cellHeight,
        rx: Math.min(3, cellWidth / 6), role: "button", class: "cell" });
      const text = cellWidth >= 13
        ? make("text", { x: x + cellWidth / 2, y: y + cellHeight / 2 + 4, "text-anchor": "middle", class: "digit",
          "aria-hidden": "true" }) : null;
      group.append(mark);
      if (text) group.append(text);
      this.listen(mark, cell.units);
      this.cells.push({ mark, text, units: cell.units });
      return mark;
    });
    svg.append(group);
    const next = (i, row, column) => {
      const { kind, layer } = CELLS[i];
      for (let k = kind + row, l = layer + column;
        k >= 0 && k < rows && l >= 0 && l < columns; k += row, l += column) {
        const found = CELL_AT.get(k * columns + l);
        if (found !== undefined) return found;
      }
      return null;
    };
    const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    roving(group, marks, (i, key) => (moves[key] ? next(i, ...moves[key]) : null),
      (i) => showUnit(CELLS[i].units[0], true));
    return svg;
  }

  drawOthers() {
    const list = html("ul", { class: CELLS.length ? "others" : "others all" });
    for (const u of OTHERS.slice(0, MOST_OTHERS)) {
      const bar = html("i", {}), value = html("span", { class: "value" });
      const mark = html("button", { type: "button" }, html("span", { class: "name" }, NAMES[u]),
        html("span", { class: "bar", "aria-hidden": "true" }, bar), value);
      this.listen(mark, [u]);
      this.cells.push({ mark, bar, value, units: [u] });
      list.append(html("li", {}, mark));
    }
    if (OTHERS.length > MOST_OTHERS) {
      list.append(html("li", { class: "more" }, `and ${OTHERS.length - MOST_OTHERS} more, in the list of units`));
    }
    return list;
  }

  listen(mark, units) {
    const words = () => this.view.lines(units, this.view.value(units));
    mark.addEventListener("pointerenter", (event) => showTip(words(), event.clientX, event.clientY));
    mark.addEventListener("pointermove", (event) => showTip(words(), event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hideTip);
    mark.addEventListener("focus", () => { if (mark.matches(":focus-visible")) tipAt(mark, words()); });
    mark.addEventListener("blur", hideTip);
    mark.addEventListener("click", () => { hideTip(); showUnit(units[0], true); });
  }

  update() {
    if (!this.cells) return;
    this.view.prepare?.();
    for (const cell of this.cells) {
      const value = this.view.value(cell.units);
      const color = Number.isFinite(value) ? this.view.color(value) : null;
      if (cell.bar) { // its words are its name
        cell.bar.style.background = color ?? "transparent";
        cell.bar.style.width = `${100 * this.view.share(value)}%`;
        cell.value.textContent = this.view.long(cell.units, value);
        continue;
      }
      cell.mark.setAttribute("aria-label", this.view.lines(cell.units, value).join(", "));
      cell.mark.setAttribute("fill", color ?? "var(--empty)");
      if (cell.text) {
        cell.text.textContent = this.view.text(cell.units, value);
        cell.text.style.fill = color ? inkOn(color) : "var(--soft)";
      }
    }
    this.outline();
  }

  outline() {
    for (const cell of this.cells ?? []) cell.mark.classList.toggle("chosen", cell.units.includes(state.unit));
  }
}

/* ---- where the bits go ---- */

const ALL_BITS = DATA.shapes.flatMap((shape) => shape.bytes.map((bytes) => (8 * bytes) / shape.weights))
  .filter((bits, _, all) => bits < 12 || all.every((other) => other >= 12)); // floats take the last colour
const BITS_LOW = Math.max(0.5, Math.floor(Math.min(...ALL_BITS)));
const BITS_HIGH = Math.max(2 * BITS_LOW, Math.ceil(Math.max(...ALL_BITS)));
const bitsShare = logScale(BITS_LOW, BITS_HIGH, 0, 1);

function bitsOfUnits(units) {
  let bytes = 0, weights = 0;
  for (const u of units) { bytes += bytesOf(u, state.choice[u]); weights += shapeOf(u).weights; }
  return (8 * bytes) / weights;
}
function formatsOfUnits(units) {
  return new Set(units.map((u) => state.choice[u]));
}
function unitsName(units) {
  if (units.length === 1) return NAMES[units[0]];
  const u = units[0];
  return `${DATA.kinds[KIND_OF[u]]}, layer ${DATA.layers[LAYER_OF[u]]}: ${plural(units.length, "unit")}`;
}
const allocationView = {
  value: bitsOfUnits,
  color: (bits) => rampColor("bits", bitsShare(bits)),
  share: (bits) => Math.min(1, bits / BITS_HIGH),
  text: (units, bits) => {
    const formats = formatsOfUnits(units);
    return formats.size > 1 ? `~${Math.round(bits)}` : DATA.formats[[...formats][0]].bits;
  },
  long: (units, bits) => `${DATA.formats[state.choice[units[0]]].short} · ${bits.toFixed(2)} bits`,
  lines: (units, bits) => {
    const formats = formatsOfUnits(units);
    return [unitsName(units),
      formats.size > 1 ? `${formats.size} formats` : DATA.formats[[...formats][0]].name,
      `${bits.toFixed(2)} bits per weight`,
      bytesText(units.reduce((sum, u) => sum + bytesOf(u, state.choice[u]), 0))];
  },
};

/* ---- what is sensitive ---- */

const sensitivity = { format: 0, density: false };
function sensitivityOf(units) {
  let kl = 0, weights = 0;
  for (const u of units) { kl += priceOf(u, sensitivity.format); weights += shapeOf(u).weights; }
  return sensitivity.density ? kl / (weights / 1e6) : kl;
}
let klShare = () => 0;
let klRange = [0.1, 1];
const sensitivityView = {
  prepare() {
    const values = [...CELLS.map((c) => c.units), ...OTHERS.map((u) => [u])].map(sensitivityOf).filter((v) => v > 0);
    const high = values.reduce((a, b) => Math.max(a, b), 0) || 1;
    const low = Math.max(values.reduce((a, b) => Math.min(a, b), high), high / 1e4);
    klRange = [low, Math.max(high, low * 1.01)];
    klShare = logScale(...klRange, 0.06, 1);
  },
  value: sensitivityOf,
  color: (kl) => rampColor("kl", kl > 0 ? klShare(kl) : 0),
  share: (kl) => (Number.isFinite(kl) && kl > 0 ? Math.max(0.02, klShare(kl)) : 0),
  text: () => "",
  long: (_, kl) => (Number.isFinite(kl) ? number(kl) : "not priced"),
  lines: (units, kl) => [unitsName(units),
    Number.isFinite(kl) ? `${number(kl)} ${DATA.nats}${sensitivity.density ? " per million weights" : ""}` : "not priced",
    `when only this is stored in ${DATA.formats[sensitivity.format].name}`],
};

function legendBar(place, ramp, ticks, position, words, start = 0) {
  const bar = html("div", { class: "ramp", "aria-hidden": "true" });
  const stops = [...Array(9).keys()].map((i) => rampColor(ramp, start + ((1 - start) * i) / 8));
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  const scale = html("div", { class: "ramp-ticks" });
  for (const tick of ticks) {
    const mark = html("span", {}, tickText(tick));
    mark.style.left = `${100 * position(tick)}%`;
    scale.append(mark);
  }
  place.replaceChildren(html("span", { class: "ramp-title" }, words), html("div", { class: "ramp-box" }, bar, scale));
}

/* How the bytes divide into formats at the budget in hand. */
function drawMix() {
  const bytes = new Float64Array(F), weights = new Float64Array(F);
  for (let u = 0; u < U; u++) {
    bytes[state.choice[u]] += bytesOf(u, state.choice[u]);
    weights[state.choice[u]] += shapeOf(u).weights;
  }
  const used = [...bytes.keys()].filter((f) => bytes[f]).sort((a, b) => bytes[a] / weights[a] - bytes[b] / weights[b]);
  const bar = html("div", { class: "mix", role: "img", "aria-label": `Share of the bytes: ${used.map((f) =>
    `${DATA.formats[f].name} ${((100 * bytes[f]) / state.bytes).toFixed(0)} %`).join(", ")}` });
  const list = html("ul", { class: "mix-legend" });
  const total = used.reduce((sum, f) => sum + bytes[f], 0);
  for (const f of used) {
    const color = rampColor("bits", bitsShare((8 * bytes[f]) / weights[f]));
    const part = html("i", {});
    part.style.flexGrow = bytes[f] / total;
    part.style.background = color;
    bar.append(part);
    const swatch = html("i", {});
    swatch.style.background = color;
    list.append(html("li", {}, swatch, `${DATA.formats[f].short} `, html("b", {}, `${((100 * bytes[f]) / total).toFixed(1)} %`)));
  }
  byId("mix").replaceChildren(bar, list);
}
