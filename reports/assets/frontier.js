/* KL against size: frontier, bound, uniform plans, measurements, and the budget in hand. */

const SIZE = DATA.size;
const CHART = DATA.chart;

/* The chart ends where plans of interest do: 16-bit floats would squeeze all others to the left. */
const FAR = 2.2; // times the plan's size
const VIEW_END = (() => {
  const near = CHART.uniform.map((p) => p.bytes).filter((bytes) => bytes <= FAR * CHART.plan.bytes);
  if (!near.length) near.push(Math.min(STOP_BYTES[LAST_STOP], FAR * CHART.plan.bytes));
  return Math.max(...near, CHART.budget > FAR * CHART.plan.bytes ? 0 : CHART.budget, CHART.plan.bytes,
    ...CHART.baselines.map((b) => b.bytes));
})();
const LAST_SEEN = lastWithin(STOP_BYTES, VIEW_END);

function frontierPoints() {
  const points = [];
  const add = (kind, name, bytes, kl, stderr, words) => {
    if (kl > 0 && bytes <= VIEW_END) points.push({ kind, name, bytes, kl, stderr, words });
  };
  const measured = new Set(CHART.baselines.map((b) => b.name));
  for (const p of CHART.uniform) {
    add("uniform", p.name, p.bytes, p.kl, 0, "one format everywhere, predicted");
  }
  for (const b of CHART.baselines) {
    const words = b.uniform ? "one format everywhere, measured" : "measured";
    add(b.uniform ? "uniform measured" : "other measured", b.name, b.bytes, b.kl, b.stderr, words);
  }
  add("plan", "this plan", CHART.plan.bytes, CHART.plan.kl, 0, "predicted");
  if (CHART.measured) {
    add("plan measured", "this plan", CHART.plan.bytes, CHART.measured.kl, CHART.measured.stderr, "measured");
  }
  for (const point of points) {
    point.labelled = point.kind.includes("measured") || !measured.has(point.name);
  }
  return points;
}

function marker(kind, x, y) {
  const shape = kind.startsWith("plan") ? `M0,-7 L7,0 L0,7 L-7,0Z`
    : kind.startsWith("other") ? `M0,-6 L6,5 L-6,5Z`
    : kind.endsWith("measured") ? `M-4.5,0 a4.5,4.5 0 1,0 9,0 a4.5,4.5 0 1,0 -9,0`
    : `M-5,-5 H5 V5 H-5Z`;
  return make("path", { d: shape, transform: `translate(${x},${y})`, class: "mark" });
}

function pointLines(point) {
  return [
    point.kind.startsWith("plan") ? "This plan" : point.name,
    `${bytesText(point.bytes)} · ${bpwOf(point.bytes).toFixed(3)} bits per weight`,
    `KL ${withError(point.kl, point.stderr)}, ${point.words}`,
  ];
}

function stopLines(stop) {
  const bytes = STOP_BYTES[stop];
  const rival = bestUniform(bytes);
  return [
    `Optimal at ${bpwOf(bytes).toFixed(2)} bits per weight`,
    `${bytesText(bytes)}, KL ${number(STOP_KL[stop])} predicted`,
    rival ? `best uniform ${rival.name}: ${number(rival.kl)}` : "no uniform format is this small",
    "Click to see its allocation",
  ];
}

/* The uniform plan with the least predicted KL within some bytes. */
function bestUniform(bytes) {
  return CHART.uniform.filter((p) => p.bytes <= bytes).reduce((a, b) => (a && a.kl <= b.kl ? a : b), null);
}

function frontierLegend() {
  const entry = (content, words) =>
    html("li", {}, fill(make("svg", { width: 22, height: 16, viewBox: "-11 -8 22 16", "aria-hidden": "true" }), {}, content), words);
  const line = (name) => make("path", { d: "M-11,0 H11", class: name });
  const shape = (kind) => fill(make("g", { class: `point ${kind}` }), {}, [marker(kind, 0, 0)]);
  const legend = [
    entry([line("curve"), line("bound")], "optimal plans, predicted; proven lower bound"),
    entry([shape("plan")], "this plan, predicted"),
  ];
  if (CHART.measured) legend.push(entry([shape("plan measured")], "this plan, measured"));
  if (CHART.uniform.length) legend.push(entry([shape("uniform")], "one format everywhere, predicted"));
  if (CHART.baselines.some((b) => b.uniform)) {
    legend.push(entry([shape("uniform measured")], "the same, measured"));
  }
  if (CHART.baselines.some((b) => !b.uniform)) {
    legend.push(entry([shape("other measured")], "other plans, measured"));
  }
  return legend;
}

function drawFrontier(place, width) {
  const narrow = width < 560;
  const height = Math.round(Math.min(460, Math.max(300, width * 0.5)));
  const points = frontierPoints();
  const inSight = points.map((p) => p.kl);
  if (!inSight.length) inSight.push(...STOP_KL.filter((kl) => kl > 0));
  const low = (inSight.length ? Math.min(...inSight) : 0.1) / 2.5;
  const high = Math.max(...inSight, STOP_KL[0] || low * 10, low * 10) * 1.6;
  const at = { left: gutter(logTicks(low, high, 7)), right: width - 12, top: 44, bottom: height - 46 };
  const right = VIEW_END, left = Math.min(...points.map((p) => p.bytes), STOP_BYTES[0]);
  const margin = 0.03 * (right - left) + 0.004 * right;
  const x = linearScale(left - margin, right + margin, at.left, at.right);
  const y = logScale(low, high, at.bottom, at.top);

  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": place.dataset.alt });
  const axis = make("g", { class: "axis", "aria-hidden": "true" });
  for (const tick of logTicks(low, high, 7)) {
    axis.append(make("path", { d: `M${at.left},${y(tick)} H${at.right}`, class: "grid" }),
      make("text", { x: at.left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)));
  }
  for (const tick of linearTicks((left - margin) / SIZE.bytes, (right + margin) / SIZE.bytes, narrow ? 5 : 9)) {
    const px = x(tick * SIZE.bytes);
    axis.append(make("path", { d: `M${px},${at.top} V${at.bottom}`, class: "grid" }),
      make("text", { x: px, y: at.bottom + 17, "text-anchor": "middle" }, tickText(tick)));
  }
  for (const tick of linearTicks(bpwOf(left - margin), bpwOf(right + margin), narrow ? 5 : 9)) {
    const px = x((tick * DATA.weights) / 8);
    axis.append(make("path", { d: `M${px},${at.top} v-5`, class: "tick" }),
      make("text", { x: px, y: at.top - 9, "text-anchor": "middle" }, tickText(tick)));
  }
  axis.append(
    make("path", { d: `M${at.left},${at.top} H${at.right} M${at.left},${at.bottom} H${at.right}`, class: "tick" }),
    make("text", { x: (at.left + at.right) / 2, y: height - 8, "text-anchor": "middle", class: "title" },
      `stored size (${SIZE.name})`),
    make("text", { x: (at.left + at.right) / 2, y: 14, "text-anchor": "middle", class: "title" }, "bits per weight"),
    make("text", { x: 13, y: (at.top + at.bottom) / 2, "text-anchor": "middle", class: "title",
      transform: `rotate(-90 13 ${(at.top + at.bottom) / 2})` }, `KL (${DATA.nats})`));
  svg.append(axis);

  const clip = make("clipPath", { id: "inside" }, make("rect", {
    x: at.left, y: at.top, width: at.right - at.left, height: at.bottom - at.top }));
  const line = [];
  for (let i = 0; i <= 300; i++) {
    const bytes = left + ((right + margin - left) * i) / 300;
    if (bytes >= STOP_BYTES[0]) line.push([bytes, boundAt(bytes)]);
  }
  STOP_BYTES.forEach((bytes, i) => line.push([bytes, STOP_KL[i]]));
  line.sort((a, b) => a[0] - b[0]);
  const path = line.filter(([bytes, kl]) => kl > 0 && bytes <= right + margin)
    .map(([bytes, kl], i) => `${i ? "L" : "M"}${x(bytes).toFixed(1)},${y(kl).toFixed(1)}`).join("");
  const inside = make("g", { "clip-path": "url(#inside)", "aria-hidden": "true" });
  inside.append(make("path", { d: `M${x(CHART.budget)},${at.top} V${at.bottom}`, class: "budget" }),
    make("path", { d: path, class: "curve" }), make("path", { d: path, class: "bound" }));
  const cursor = make("g", { class: "cursor" },
    make("path", { d: `M0,${at.top} V${at.bottom}` }), make("circle", { r: 6 }));
  inside.append(cursor);
  const pad = make("rect", { x: at.left, y: at.top, width: at.right - at.left, height: at.bottom - at.top,
    fill: "transparent", class: "pad" });
  svg.append(clip, inside, pad);

  const taken = points.map((p) => [x(p.bytes) - 7, y(p.kl) - 7, x(p.bytes) + 7, y(p.kl) + 7]);
  for (let i = 0; i < line.length; i += 4) {
    if (line[i][1] > 0) taken.push([x(line[i][0]) - 1, y(line[i][1]) - 1, x(line[i][0]) + 1, y(line[i][1]) + 1]);
  }
  const layer = make("g", { role: "group", "aria-label": "Plans; arrow keys move between them" });
  const marks = points.map((point) => {
    const px = x(point.bytes), py = y(point.kl);
    const group = make("g", { class: `point ${point.kind}`, role: "img", "aria-label": pointLines(point).join(", ") });
    if (point.stderr > 0) {
      const top = y(point.kl + point.stderr), end = y(Math.max(point.kl - point.stderr, low));
      group.append(make("path", { d: `M${px},${top} V${end} M${px - 4},${top} h8 M${px - 4},${end} h8`, class: "error" }));
    }
    group.append(marker(point.kind, px, py), make("circle", { cx: px, cy: py, r: 12, fill: "transparent" }));
    group.addEventListener("pointerenter", (event) => showTip(pointLines(point), event.clientX, event.clientY));
    group.addEventListener("pointerleave", hideTip);
    group.addEventListener("focus", () => { if (group.matches(":focus-visible")) tipAt(group, pointLines(point)); });
    group.addEventListener("blur", hideTip);
    layer.append(group);
    return group;
  });
  labelPoints(layer, points, x, y, at, taken);
  svg.append(layer);
  const order = points.map((_, i) => i).sort((a, b) => points[a].bytes - points[b].bytes);
  roving(layer, order.map((i) => marks[i]), (i, key) =>
    ({ ArrowRight: i + 1, ArrowUp: i + 1, ArrowLeft: i - 1, ArrowDown: i - 1, Home: 0, End: marks.length - 1 })[key] ?? null);

  const stopAt = (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * width;
    const bytes = left - margin + ((px - at.left) / (at.right - at.left)) * (right - left + 2 * margin);
    return lastWithin(STOP_BYTES, Math.min(bytes, VIEW_END));
  };
  pad.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) showStop(stopAt(event));
    showTip(stopLines(stopAt(event)), event.clientX, event.clientY);
  });
  pad.addEventListener("pointerleave", hideTip);
  pad.addEventListener("pointerdown", (event) => showStop(stopAt(event)));
  place.replaceChildren(svg);

  drawFrontier.move = () => {
    const shown = state.stop >= 0;
    cursor.setAttribute("visibility", shown ? "visible" : "hidden");
    if (!shown) return;
    const px = Math.min(x(state.bytes), at.right);
    cursor.firstChild.setAttribute("transform", `translate(${px},0)`);
    cursor.lastChild.setAttribute("cx", px);
    cursor.lastChild.setAttribute("cy", y(state.kl));
  };
  drawFrontier.move();
}

/* Names beside the marks, the most important first, where there is room. */
function labelPoints(layer, points, x, y, at, taken) {
  const rank = (p) => (p.kind.startsWith("plan") ? 0 : p.kind.startsWith("other") ? 1 : p.stderr ? 2 : 3);
  const done = new Set();
  for (const point of [...points].sort((a, b) => rank(a) - rank(b))) {
    const key = point.kind.startsWith("plan") ? "plan" : point.name;
    if (!point.labelled || done.has(key)) continue;
    const name = point.kind.startsWith("plan") ? "this plan" : shortName(point.name);
    const w = textWidth(name, 11.5), px = x(point.bytes), py = y(point.kl);
    const spots = [[px + 9, py - 4, "start"], [px + 9, py + 12, "start"], [px - 9, py + 12, "end"], [px - 9, py - 4, "end"],
      [px, py - 12, "middle"], [px, py + 20, "middle"]];
    for (const [tx, ty, anchor] of spots) {
      const start = anchor === "start" ? tx : anchor === "end" ? tx - w : tx - w / 2;
      const box = [start - 2, ty - 10, start + w + 2, ty + 3];
      const free = box[0] > at.left && box[2] < at.right && box[1] > at.top && box[3] < at.bottom
        && !taken.some((b) => b[0] < box[2] && box[0] < b[2] && b[1] < box[3] && box[1] < b[3]);
      if (free) {
        taken.push(box);
        done.add(key);
        layer.append(make("text", { x: tx, y: ty, "text-anchor": anchor, "aria-hidden": "true",
          class: `label ${point.kind}` }, name));
        break;
      }
    }
  }
}
const SHORT = Object.fromEntries(DATA.formats.map((f) => [f.name, f.short]));
const shortName = (name) => SHORT[name] ?? name;

/* Predicted against measured KL of every plan that was measured. */
function drawPrediction(place, width) {
  const checks = CHART.baselines.map((b) => ({
    kind: b.uniform ? "uniform measured" : "other measured",
    name: b.name, bytes: b.bytes, predicted: b.predicted, kl: b.kl, stderr: b.stderr,
  }));
  checks.push({ kind: "plan measured", name: "this plan", bytes: CHART.plan.bytes, predicted: CHART.plan.kl,
    kl: CHART.measured.kl, stderr: CHART.measured.stderr });
  const shown = checks.filter((c) => c.predicted > 0 && c.kl > 0);
  if (!shown.length) { place.replaceChildren(html("p", {}, "No plan that was measured has a KL above zero.")); return; }
  const side = Math.min(width, 480), narrow = side < 420;
  const values = shown.flatMap((c) => [c.predicted, c.kl]);
  const low = Math.min(...values) / 1.6, high = Math.max(...values) * 1.6;
  const at = { left: gutter(logTicks(low, high, 7)), right: side - 14, top: 10, bottom: side - 48 };
  const x = logScale(low, high, at.left, at.right), y = logScale(low, high, at.bottom, at.top);
  const svg = make("svg", { viewBox: `0 0 ${side} ${side}`, width: side, height: side, role: "group", "aria-label": place.dataset.alt });
  const axis = make("g", { class: "axis", "aria-hidden": "true" });
  axis.append(make("path", { class: "band", d: `M${x(low)},${y(low)} L${x(low)},${y(low * 2)} L${x(high / 2)},${y(high)} L${x(high)},${y(high)} L${x(high)},${y(high / 2)} L${x(low * 2)},${y(low)}Z` }));
  for (const tick of logTicks(low, high, narrow ? 5 : 7)) {
    axis.append(make("path", { d: `M${at.left},${y(tick)} H${at.right} M${x(tick)},${at.top} V${at.bottom}`, class: "grid" }),
      make("text", { x: at.left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)),
      make("text", { x: x(tick), y: at.bottom + 17, "text-anchor": "middle" }, tickText(tick)));
  }
  axis.append(make("path", { d: `M${x(low)},${y(low)} L${x(high)},${y(high)}`, class: "bound" }),
    make("text", { x: (at.left + at.right) / 2, y: side - 8, "text-anchor": "middle", class: "title" }, `predicted KL (${DATA.nats})`),
    make("text", { x: 13, y: (at.top + at.bottom) / 2, "text-anchor": "middle", class: "title",
      transform: `rotate(-90 13 ${(at.top + at.bottom) / 2})` }, `measured KL (${DATA.nats})`));
  svg.append(axis);
  const layer = make("g", { role: "group", "aria-label": "Measured plans; arrow keys move between them" });
  const taken = shown.map((c) => [x(c.predicted) - 7, y(c.kl) - 7, x(c.predicted) + 7, y(c.kl) + 7]);
  const marks = shown.map((check) => {
    const px = x(check.predicted), py = y(check.kl);
    const words = [check.name, `predicted ${number(check.predicted)}`, `measured ${withError(check.kl, check.stderr)}`,
      `measured is ${(check.kl / check.predicted).toFixed(2)} of predicted`];
    const group = make("g", { class: `point ${check.kind}`, role: "img", "aria-label": words.join(", ") });
    if (check.stderr > 0) {
      const top = y(check.kl + check.stderr), end = y(Math.max(check.kl - check.stderr, low));
      group.append(make("path", { d: `M${px},${top} V${end} M${px - 4},${top} h8 M${px - 4},${end} h8`, class: "error" }));
    }
    group.append(marker(check.kind, px, py), make("circle", { cx: px, cy: py, r: 12, fill: "transparent" }));
    group.addEventListener("pointerenter", (event) => showTip(words, event.clientX, event.clientY));
    group.addEventListener("pointerleave", hideTip);
    group.addEventListener("focus", () => { if (group.matches(":focus-visible")) tipAt(group, words); });
    group.addEventListener("blur", hideTip);
    layer.append(group);
    return group;
  });
  labelPoints(layer, shown.map((c) => ({ ...c, bytes: c.predicted, labelled: true })), x, y, at, taken);
  svg.append(layer);
  const order = shown.map((_, i) => i).sort((a, b) => shown[a].predicted - shown[b].predicted);
  roving(layer, order.map((i) => marks[i]), (i, key) =>
    ({ ArrowRight: i + 1, ArrowUp: i + 1, ArrowLeft: i - 1, ArrowDown: i - 1 })[key] ?? null);
  place.replaceChildren(svg);
}
