/* Puts the page together: draws every figure and connects the controls. */

document.documentElement.classList.add("scripted");

/* ---- size and quality ---- */

byId("frontier-legend").replaceChildren(...frontierLegend());
const redraws = [responsive(byId("frontier-chart"), (width) => drawFrontier(byId("frontier-chart"), width))];
if (byId("prediction-chart")) {
  redraws.push(responsive(byId("prediction-chart"), (width) => drawPrediction(byId("prediction-chart"), width)));
}

/* ---- the budget ---- */

const slider = byId("budget");
const SLIDER = 1000; // positions: even in bytes, so that it moves like the chart's axis
slider.max = SLIDER;
const positionOf = (bytes) =>
  Math.round((SLIDER * (bytes - STOP_BYTES[0])) / (STOP_BYTES[LAST_SEEN] - STOP_BYTES[0] || 1));

function readout() {
  const rival = bestUniform(state.bytes), own = state.stop < 0;
  const part = (value, label) => html("span", {}, html("b", {}, value), ` ${label}`);
  const parts = [part(bpwOf(state.bytes).toFixed(2), "bits per weight"), part(bytesText(state.bytes), ""),
    part(number(state.kl), "KL predicted")];
  if (own && CHART.measured) parts.push(part(withError(CHART.measured.kl, CHART.measured.stderr), "measured"));
  else if (rival) parts.push(part(number(rival.kl), `best uniform (${shortName(rival.name)})`));
  byId("readout").replaceChildren(...parts);
  byId("which").textContent = own ? "This plan" : "Optimal plan at this budget";
  byId("reset").disabled = own;
  slider.value = positionOf(state.bytes);
  slider.setAttribute("aria-valuetext", `${bpwOf(state.bytes).toFixed(2)} bits per weight, ${bytesText(state.bytes)}, predicted KL ${number(state.kl)}`);
}

const currentStop = () => (state.stop >= 0 ? state.stop : lastWithin(STOP_BYTES, state.bytes));
slider.addEventListener("input", () => {
  const bytes = STOP_BYTES[0] + ((STOP_BYTES[LAST_SEEN] - STOP_BYTES[0]) * slider.value) / SLIDER;
  showStop(lastWithin(STOP_BYTES, bytes));
});
slider.addEventListener("keydown", (event) => { // one plan of the frontier at a time
  const page = Math.max(1, Math.round(LAST_SEEN / 20));
  const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: page, PageDown: -page,
    Home: -STOP_BYTES.length, End: STOP_BYTES.length };
  if (!(event.key in moves)) return;
  event.preventDefault();
  showStop(Math.min(LAST_SEEN, currentStop() + moves[event.key]));
});
byId("reset").addEventListener("click", () => { showPlan(); slider.focus(); });

/* ---- allocation and sensitivity ---- */

const allocation = new Grid(byId("allocation-chart"), allocationView);
const bitsLegend = () => legendBar(byId("allocation-legend"), "bits",
  [1, 2, 3, 4, 5, 6, 8, 12, 16, 32].filter((b) => b >= BITS_LOW && b <= BITS_HIGH), bitsShare, "bits per weight");
bitsLegend();

const formatSelect = byId("sensitivity-format");
const priced = DATA.formats.map((_, f) => f).filter((f) => [...Array(U).keys()].some((u) => priceOf(u, f) > 0));
formatSelect.replaceChildren(...priced.map((f) => html("option", { value: f }, DATA.formats[f].name)));
const reference = priced.map((f) => {
  let bytes = 0;
  for (let u = 0; u < U; u++) bytes += bytesOf(u, f);
  return Math.abs(bpwOf(bytes) - 4.3);
});
sensitivity.format = priced.length ? priced[reference.indexOf(Math.min(...reference))] : 0;
formatSelect.value = sensitivity.format;
const sensitivityGrid = new Grid(byId("sensitivity-chart"), sensitivityView);
const klLegend = () => legendBar(byId("sensitivity-legend"), "kl", logTicks(...klRange, 4), klShare,
  `${DATA.nats}${sensitivity.density ? " per million weights" : ""}`);
klLegend();
const sensitivityChanged = () => {
  sensitivity.format = Number(formatSelect.value);
  sensitivity.density = byId("density").checked;
  sensitivityGrid.update();
  klLegend();
};
formatSelect.addEventListener("change", sensitivityChanged);
byId("density").addEventListener("change", sensitivityChanged);

/* ---- why ---- */

const unitSelect = byId("unit");
const filter = byId("unit-filter");
const MOST_OPTIONS = 2000;
function listUnits() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (let u = 0; u < U && found.length < MOST_OPTIONS; u++) {
    const name = NAMES[u].toLowerCase();
    if (words.every((word) => name.includes(word))) found.push(u);
  }
  if (!found.includes(state.unit) && !words.length) found.unshift(state.unit);
  unitSelect.replaceChildren(...found.map((u) => html("option", { value: u }, NAMES[u])));
  if (found.includes(state.unit)) unitSelect.value = state.unit;
  else if (found.length) showUnit(found[0]);
  byId("unit-count").textContent = found.length ? plural(found.length, "unit") : "no unit has such a name";
}
filter.addEventListener("input", listUnits);
unitSelect.addEventListener("change", () => showUnit(Number(unitSelect.value)));
const redrawPrices = responsive(byId("price-chart"), (width) => drawPrices(byId("price-chart"), width));
const redrawRates = responsive(byId("rate-chart"), (width) => drawRates(byId("rate-chart"), width));
redraws.push(redrawPrices, redrawRates);

function why() {
  const u = state.unit;
  if (unitSelect.value !== String(u)) {
    if (![...unitSelect.options].some((option) => option.value === String(u))) { filter.value = ""; listUnits(); }
    unitSelect.value = u;
  }
  const where = LAYER_OF[u] < 0 ? "outside the layers" : `${DATA.kinds[KIND_OF[u]]} of layer ${DATA.layers[LAYER_OF[u]]}`;
  byId("unit-about").textContent = `${shapeOf(u).text}, ${shapeOf(u).weights.toLocaleString("en")} weights, ${where}`;
  byId("reasons").replaceChildren(...explain(u).flatMap(([term, words]) => [html("dt", {}, term), html("dd", {}, words)]));
  redrawPrices();
  redrawRates();
}

on("budget", () => {
  readout();
  drawFrontier.move?.();
  drawMix();
  allocation.update();
  why();
});
on("unit", () => { why(); allocation.outline(); sensitivityGrid.outline(); });

/* Begin with the unit that resampling is least sure of, or the one that costs most. */
const starting = [...Array(U).keys()].map((u) => (CONFIDENCE ? CONFIDENCE.agreement[u] : -(priceOf(u, PLAN[u]) || 0)));
state.unit = starting.indexOf(starting.reduce((a, b) => Math.min(a, b), Infinity));
listUnits();
showPlan();
tell("unit");

/* ---- the rest of the page ---- */

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(byId(button.dataset.copy).textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
function recolor() {
  bitsLegend();
  allocation.update();
  sensitivityGrid.update();
  klLegend();
  drawMix();
  redraws.forEach((redraw) => redraw());
}
dark.addEventListener("change", recolor);
addEventListener("beforeprint", () => {
  printing = true;
  recolor();
  for (const details of document.querySelectorAll("details")) details.open = true;
});
addEventListener("afterprint", () => { printing = false; recolor(); });
