"use strict";
/* The page of all runs: asks the server again and again, and changes only what changed. */

const byId = (id) => document.getElementById(id);
const html = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const FAST = 1000, SLOW = 5000; // milliseconds between two questions

function clock(seconds) {
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60, rest = String(whole % 60).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}
const number = (value) => Number(value.toPrecision(3)).toString();
const time = (text) => new Date(text).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

const cards = new Map(); // name -> elements
const open = new Set();
const chosen = new Set();

function makeCard(run) {
  const card = {
    root: html("article", { class: "card run" }),
    title: html("h2", {}, run.title),
    status: html("span", {}),
    about: html("p", { class: "figures" }),
    when: html("p", { class: "soft" }),
    bar: html("progress", { "aria-label": `Progress of ${run.title}` }),
    doing: html("p", { class: "soft" }),
    report: html("a", {}, "Report"),
    more: html("button", { type: "button", class: "linkish", "aria-expanded": "false" }, "Details"),
    pick: html("input", { type: "checkbox" }),
    details: html("div", { class: "details" }),
  };
  card.label = html("label", {}, card.pick, "Compare");
  card.progress = html("div", { class: "progress" }, card.bar, card.doing);
  const actions = html("div", { class: "actions" }, card.report, card.more, card.label);
  card.root.append(html("div", {}, card.title, card.about, card.when, actions), html("div", { class: "side" }, card.status),
    card.progress, card.details);
  card.more.addEventListener("click", () => {
    if (open.has(run.name)) open.delete(run.name); else open.add(run.name);
    card.more.setAttribute("aria-expanded", open.has(run.name));
    card.details.hidden = !open.has(run.name);
    if (open.has(run.name)) showDetails(run.name);
  });
  card.pick.addEventListener("change", () => {
    if (card.pick.checked) chosen.add(run.name); else chosen.delete(run.name);
    showChosen();
  });
  card.details.hidden = true;
  cards.set(run.name, card);
  return card;
}

function showRun(run) {
  const card = cards.get(run.name) ?? makeCard(run);
  card.status.textContent = run.status;
  card.status.className = `status ${run.status}`;
  const figures = [];
  if (run.bpw !== null) {
    figures.push(`${run.budget}: `, html("b", {}, `${run.bpw.toFixed(3)} bits per weight`));
    if (run.kl !== null) figures.push(", KL ", html("b", {}, number(run.kl)), " measured");
  } else figures.push(run.status === "done" ? "no plan" : "no plan yet");
  card.about.replaceChildren(...figures);
  card.when.textContent = `started ${time(run.started)}, ${clock(run.seconds)} of work`;
  const running = run.status === "running";
  card.progress.hidden = run.status === "done";
  card.bar.hidden = !running;
  if (run.total) { card.bar.max = run.total; card.bar.value = run.done; } else card.bar.removeAttribute("value");
  const left = running && run.eta !== null ? `, ${clock(run.eta)} left` : "";
  card.doing.textContent = `${run.doing || run.stage || "starting"}${run.total ? ` ${run.done}/${run.total}` : ""}${left}`;
  card.report.hidden = !run.report;
  if (run.report) card.report.href = run.report;
  card.label.hidden = !run.plan;
  if (open.has(run.name) && running) showDetails(run.name);
  return card.root;
}

async function showDetails(name) {
  const answer = await fetch(`/api/run?name=${encodeURIComponent(name)}`);
  const place = cards.get(name).details;
  if (!answer.ok) { place.textContent = await answer.text(); return; }
  const run = await answer.json();
  const stages = html("table", {}, html("thead", {}, html("tr", {}, ...["stage", "status", "time"].map((t) => html("th", { scope: "col" }, t)))),
    html("tbody", {}, ...run.stages.map((stage) => html("tr", {}, html("th", { scope: "row" }, stage.name),
      html("td", {}, stage.status), html("td", {}, clock(stage.seconds))))));
  const log = run.log.map((entry) => `${entry.time.slice(11, 19)} ${entry.fields.text ?? entry.event}${entry.fields.stage
    ? `: ${entry.fields.stage}` : ""}${entry.fields.error ? ` – ${entry.fields.error}` : ""}`).join("\n");
  const files = html("p", {}, "Files: ");
  run.files.forEach((file, i) => files.append(i ? ", " : "",
    html("a", { href: `/files/${encodeURIComponent(name)}/${file}` }, file)));
  const before = place.querySelector("pre.log");
  const atEnd = !before || before.scrollTop + before.clientHeight >= before.scrollHeight - 8;
  const end = before ? before.scrollTop : 0;
  const text = html("pre", { class: "log", tabindex: "0", role: "log", "aria-label": "Log" }, log);
  place.replaceChildren(html("pre", { tabindex: "0", "aria-label": "Command" }, run.command), stages, files,
    ...(run.study ? [html("p", { class: "soft" }, "The trials of its search: ", html("code", {}, "bitplan report RUN --study"))] : []), text);
  text.scrollTop = atEnd ? text.scrollHeight : end;
}

function showChosen() {
  const [a, b] = chosen, form = byId("compare");
  form.a.value = a ?? "";
  form.b.value = b ?? "";
  form.querySelector("button").disabled = chosen.size !== 2;
  byId("chosen").textContent = chosen.size === 2 ? `${a} and ${b}` : chosen.size > 2 ? "Choose only two runs." : "Choose two runs.";
}

async function refresh() {
  let pause = SLOW;
  try {
    const answer = await fetch("/api/runs");
    if (!answer.ok) throw new Error(await answer.text());
    const { folder, runs } = await answer.json();
    byId("folder").textContent = folder;
    const running = runs.filter((run) => run.status === "running").length;
    if (running) pause = FAST;
    const state = runs.length ? `${runs.length} run${runs.length === 1 ? "" : "s"}, ${running} running`
      : "No runs here yet. `bitplan search` makes one; it will appear here.";
    if (byId("state").textContent !== state) byId("state").textContent = state;
    const place = byId("runs"), elements = runs.map(showRun);
    elements.forEach((element, i) => { if (place.children[i] !== element) place.insertBefore(element, place.children[i] ?? null); });
    while (place.children.length > elements.length) place.lastChild.remove();
    byId("compare").hidden = runs.filter((run) => run.plan).length < 2;
  } catch (error) {
    byId("state").textContent = "The server does not answer; it may have been stopped.";
  }
  setTimeout(refresh, pause);
}
refresh();
