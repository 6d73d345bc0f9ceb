/* Why one unit has its format: its price curve, what its upgrades buy, how sure that is. */

const CONFIDENCE = DATA.confidence && {
  agreement: unpack(DATA.confidence.agreement, Uint8Array),
  runner: unpack(DATA.confidence.runner, Uint8Array),
  more: unpack(DATA.confidence.more, Uint16Array),
};

/* What a unit pays for limits besides the bytes, nats per token. */
const chargeOf = (u, f) => (CHARGES ? CHARGES[u * F + f] : 0);

/* The options of a unit in order of size, and those on its lower hull, smallest first. */
function optionsOf(u) {
  return [...Array(F).keys()]
    .filter((f) => Number.isFinite(priceOf(u, f)))
    .map((f) => ({ format: f, bytes: bytesOf(u, f), kl: priceOf(u, f), error: errorOf(u, f), allowed: isAllowed(u, f) }))
    .sort((a, b) => a.bytes - b.bytes || a.kl - b.kl);
}

/* The upgrades along a unit's hull: nats bought, bytes paid, and from which budget on. */
function upgradesOf(u) {
  const path = pathOf(u);
  return path.slice(1).map(({ format, step }, i) => {
    const from = path[i].format;
    const bytes = bytesOf(u, format) - bytesOf(u, from);
    const kl = priceOf(u, from) - priceOf(u, format);
    const stop = Math.min(LAST_STOP, lastWithin(STOPS, step) + 1);
    return { from, to: format, bytes, kl, rate: kl / bytes, bpw: bpwOf(STOP_BYTES[stop]) };
  });
}

/* The first upgrade of the hull that is larger and better than what the unit has. */
function nextUpgrade(u) {
  const now = state.choice[u];
  for (const up of upgradesOf(u)) {
    const bytes = bytesOf(u, up.to) - bytesOf(u, now), kl = priceOf(u, now) - priceOf(u, up.to);
    if (bytes > 0 && kl > 0) return { to: up.to, bytes, kl, rate: kl / bytes, bpw: up.bpw };
  }
  return null;
}

/* The next smaller format of the hull, which the unit could be stored in instead. */
function lastUpgrade(u) {
  const now = state.choice[u];
  let best = null;
  for (const { format } of pathOf(u)) {
    const bytes = bytesOf(u, now) - bytesOf(u, format), kl = priceOf(u, format) - priceOf(u, now);
    if (bytes > 0 && kl > 0) best = { from: format, bytes, kl, rate: kl / bytes };
  }
  return best;
}

const perSize = (rate) => `${number(rate * SIZE.bytes)} nats per ${SIZE.name}`;
const nameOf = (f) => DATA.formats[f].name;

function explain(u) {
  const now = state.choice[u], lines = [];
  const add = (term, ...words) => lines.push([term, words.join(" ")]);
  const price = priceOf(u, now);
  add("Stored as", `${nameOf(now)}: ${bytesText(bytesOf(u, now))}, ${bitsOf(u, now).toFixed(2)} bits per weight.`,
    Number.isFinite(price)
      ? `Predicted to cost ${withError(price, errorOf(u, now))} ${DATA.nats}, ${(state.kl ? (100 * price) / state.kl : 0).toFixed(2)} % of the whole.`
      : "This format has no price in the profile.");
  const down = lastUpgrade(u), up = nextUpgrade(u), rate = state.lambda;
  add("Going rate", rate > 0
    ? `At this budget a byte is worth it if it buys at least λ = ${perSize(rate)}.`
    : "Nothing left to buy: every unit has its best format, so bytes are free here.");
  if (down) {
    const ratio = rate > 0 ? `, ${(down.rate / rate).toFixed(2)} times the going rate` : "";
    add("What it has", `The step from ${nameOf(down.from)} takes ${bytesText(down.bytes)} and buys ${number(down.kl)}: ${perSize(down.rate)}${ratio}.`);
  } else {
    add("What it has", "The smallest format that this unit may take.");
  }
  if (up) {
    const ratio = rate > 0 ? `, ${(up.rate / rate).toFixed(2)} times the going rate` : "";
    add("Next upgrade", `${nameOf(up.to)}: ${bytesText(up.bytes)} more for ${number(up.kl)} less: ${perSize(up.rate)}${ratio}.`,
      up.rate > rate && rate > 0 ? "It is worth that much, but its bytes do not fit any more." : "",
      up.bpw > bpwOf(state.bytes) ? `Optimal plans take it from ${up.bpw.toFixed(2)} bits per weight on.` : "");
  } else {
    add("Next upgrade", "None: no larger format has a lower price.");
  }
  const closed = optionsOf(u).filter((o) => !o.allowed);
  if (closed.length) {
    add("Limits", `refuse ${closed.map((o) => nameOf(o.format)).join(", ")} here.`);
  }
  if (state.stop < 0) {
    const same = STOP_BYTES.length && frontierFormat(u, CHART.plan.bytes);
    if (DATA.refined && same !== now) {
      add("Refinement", `One-shot prices would give it ${nameOf(same)}; prices at the quantized weights and measured KL decided otherwise.`);
    }
    if (CONFIDENCE) {
      const share = CONFIDENCE.agreement[u] / DATA.confidence.shares;
      const runner = CONFIDENCE.runner[u], more = CONFIDENCE.more[u];
      const other = runner < F ? `; the runner-up is ${nameOf(runner)}` : "";
      const need = share >= 0.9 ? "" : more === DATA.confidence.tie ? ` It is a tie: more ${DATA.drawn} will not settle it.`
        : more > 0 ? ` About ${more.toLocaleString("en")} more calibration ${DATA.drawn} would settle it.` : "";
      add("How sure", `${(100 * share).toFixed(0)} % of ${DATA.confidence.resamples} bootstrap resamples choose this format${other}.${need}`);
    }
  }
  return lines;
}

/* The format a unit has in the optimal plan of a size. */
function frontierFormat(u, bytes) {
  const steps = STOPS[lastWithin(STOP_BYTES, bytes)];
  let format = START[u];
  for (let k = 0; k < steps; k++) if (STEP_UNIT[k] === u) format = STEP_FORMAT[k];
  return format;
}

function drawPrices(place, width) {
  const u = state.unit, options = optionsOf(u), path = new Set(pathOf(u).map((p) => p.format));
  const far = FAR * bytesOf(u, state.choice[u]);
  const shown = options.filter((o) => o.kl > 0 && o.bytes <= far);
  if (!shown.length) { place.replaceChildren(html("p", {}, "No format of this size costs anything.")); return; }
  const biggest = shown.at(-1).bytes;
  const [divisor, name] = biggest >= 2e6 ? [1e6, "MB"] : biggest >= 2e3 ? [1e3, "kB"] : [1, "B"];
  const low = Math.min(...shown.map((o) => o.kl)) / 1.7, high = Math.max(...shown.map((o) => o.kl)) * 1.7;
  const ticks = logTicks(low, high, 5), height = 280;
  const at = { left: gutter(ticks), right: width - 14, top: 14, bottom: height - 44 };
  const x = linearScale(options[0].bytes, biggest, at.left + 12, at.right - 12), y = logScale(low, high, at.bottom, at.top);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": `Price curve of ${NAMES[u]}: ${shown.map((o) => `${nameOf(o.format)} ${number(o.kl)}`).join(", ")}` });
  svg.append(...axes(at, ticks, y, linearTicks(options[0].bytes / divisor, biggest / divisor, 5),
    (tick) => x(tick * divisor), `size of this unit (${name})`, `KL (${DATA.nats})`, height));
  const hull = shown.filter((o) => path.has(o.format));
  svg.append(make("path", { class: "curve", d: hull.map((o, i) => `${i ? "L" : "M"}${x(o.bytes)},${y(o.kl)}`).join("") }));
  const taken = shown.map((o) => [x(o.bytes) - 7, y(o.kl) - 7, x(o.bytes) + 7, y(o.kl) + 7]);
  const order = [...shown].sort((a, b) => (b.format === state.choice[u]) - (a.format === state.choice[u]));
  for (const option of [...order].reverse()) { // the chosen one on top
    const chosen = option.format === state.choice[u], px = x(option.bytes), py = y(option.kl);
    const kind = chosen ? "plan measured" : option.allowed ? (path.has(option.format) ? "hull" : "off") : "refused";
    const words = [nameOf(option.format), `${bytesText(option.bytes)}, ${bitsOf(u, option.format).toFixed(2)} bits per weight`,
      `KL ${withError(option.kl, option.error)}`, chosen ? "chosen" : option.allowed ? (path.has(option.format) ? "on the lower hull" : "never optimal") : "refused by a limit"];
    const group = make("g", { class: `point ${kind}` });
    if (option.error > 0) {
      group.append(make("path", { class: "error", d: `M${px},${y(option.kl + option.error)} V${y(Math.max(option.kl - option.error, low))}` }));
    }
    group.append(marker(chosen ? "plan" : "uniform measured", px, py), make("circle", { cx: px, cy: py, r: 12, fill: "transparent" }));
    group.addEventListener("pointerenter", (event) => showTip(words, event.clientX, event.clientY));
    group.addEventListener("pointerleave", hideTip);
    svg.append(group);
  }
  labelPoints(svg, order.map((o) => ({ bytes: o.bytes, kl: o.kl, name: nameOf(o.format), labelled: true,
    stderr: o.allowed ? 1 : 0, kind: o.format === state.choice[u] ? "other" : "uniform" })), x, y, at, taken);
  place.replaceChildren(svg);
}

/* Bars: nats per byte of every upgrade; the line is the going rate. */
function drawRates(place, width) {
  const u = state.unit, ups = upgradesOf(u);
  if (!ups.length) { place.replaceChildren(html("p", {}, "This unit has a single format: there is nothing to buy.")); return; }
  const rates = ups.map((up) => up.rate * SIZE.bytes), rate = state.lambda * SIZE.bytes;
  const all = [...rates, rate].filter((r) => r > 0);
  const low = Math.min(...all) / 2.5, high = Math.max(...all) * 1.6;
  const ticks = logTicks(low, high, 5), height = 280;
  const at = { left: gutter(ticks), right: width - 14, top: 14, bottom: height - 62 };
  const y = logScale(low, high, at.bottom, at.top);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": `What every upgrade of ${NAMES[u]} buys: ${ups.map((up, i) =>
      `${nameOf(up.to)} ${number(rates[i])}`).join(", ")}; the going rate is ${number(rate)}` });
  svg.append(...axes(at, ticks, y, [], null, "", `nats per ${SIZE.name}`, height));
  const step = (at.right - at.left) / ups.length, bar = Math.min(46, step * 0.66);
  const now = bytesOf(u, state.choice[u]);
  ups.forEach((up, i) => {
    const px = at.left + (i + 0.5) * step, bought = bytesOf(u, up.to) <= now;
    const words = [`${nameOf(up.from)} → ${nameOf(up.to)}`, `${bytesText(up.bytes)} more, KL ${number(up.kl)} less`,
      perSize(up.rate), bought ? "bought" : `bought from ${up.bpw.toFixed(2)} bits per weight on`];
    const mark = make("rect", { x: px - bar / 2, y: y(up.rate * SIZE.bytes), width: bar, rx: 2,
      height: Math.max(1, at.bottom - y(up.rate * SIZE.bytes)), class: bought ? "bought" : "unbought" });
    mark.addEventListener("pointerenter", (event) => showTip(words, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hideTip);
    const name = DATA.formats[up.to].short.split("-"), lines = step > textWidth(name.join("-"), 11.5) + 6 ? [name.join("-")] : name;
    svg.append(mark, ...lines.map((part, row) => make("text", { x: px, y: at.bottom + 16 + 13 * row, "text-anchor": "middle",
      class: "axis", "aria-hidden": "true" }, part)));
  });
  svg.append(make("text", { x: (at.left + at.right) / 2, y: height - 6, "text-anchor": "middle", class: "axis title",
    "aria-hidden": "true" }, "upgrade to"));
  if (rate > 0) {
    svg.append(make("path", { d: `M${at.left},${y(rate)} H${at.right}`, class: "rate" }),
      make("text", { x: at.right, y: y(rate) - 6, "text-anchor": "end", class: "label rate-label", "aria-hidden": "true" }, "going rate λ"));
  }
  place.replaceChildren(svg);
}

function axes(at, yTicks, y, xTicks, x, xTitle, yTitle, height) {
  const group = make("g", { class: "axis", "aria-hidden": "true" });
  for (const tick of yTicks) {
    group.append(make("path", { d: `M${at.left},${y(tick)} H${at.right}`, class: "grid" }),
      make("text", { x: at.left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)));
  }
  for (const tick of xTicks) {
    group.append(make("text", { x: x(tick), y: at.bottom + 17, "text-anchor": "middle" }, tickText(tick)));
  }
  group.append(make("path", { d: `M${at.left},${at.bottom} H${at.right}`, class: "tick" }),
    make("text", { x: (at.left + at.right) / 2, y: height - 8, "text-anchor": "middle", class: "title" }, xTitle),
    make("text", { x: 13, y: (at.top + at.bottom) / 2, "text-anchor": "middle", class: "title",
      transform: `rotate(-90 13 ${(at.top + at.bottom) / 2})` }, yTitle));
  return [group];
}
