// The head map, its layer profile, the card of the chosen unit, and the atlas of all settings.

const source = (name) => plots.find((document) => document.get_model_by_name(name))?.get_model_by_name(name);
const fill = (name, columns) => { const found = source(name); if (found) found.data = columns; };

const valuesAt = (run, name, task = state.task, shots = state.shots) => {
  const start = settingIndex(run, task, shots) * run.perSetting;
  return run.units.metrics[name]?.values.subarray(start, start + run.perSetting);
};
const sliceAt = (run, name, task = state.task, shots = state.shots) => {
  const start = settingIndex(run, task, shots) * run.perSetting;
  return run.units[name].subarray(start, start + run.perSetting);
};
// Whether units are significant by the chosen metric or, where nothing is claimed by it, by the drop.
const DROP = "gold_logprob_drop";
const claimedMetric = (run) => (state.metric in run.units.significant ? state.metric : DROP);
function significantAt(run, task = state.task, shots = state.shots) {
  const start = settingIndex(run, task, shots) * run.perSetting, flags = run.units.significant[claimedMetric(run)];
  return flags ? flags.subarray(start, start + run.perSetting) : new Uint8Array(run.perSetting);
}
const claimedText = (run) => run.units.metrics[claimedMetric(run)]?.label ?? "drop of gold log-probability";
const isShown = (run, significant, unit) => !state.significant || significant[unit] === 1;

function ranks(values) {
  const order = [...values.keys()].filter((i) => !Number.isNaN(values[i])).sort((a, b) => values[b] - values[a]);
  const found = new Map();
  order.forEach((unit, place) => found.set(unit, place + 1));
  return found;
}

function describeUnit(run, unit, ranked) {
  const lines = [], drops = valuesAt(run, DROP);
  if (drops && !Number.isNaN(drops[unit])) {
    const exact = sliceAt(run, "exact")[unit];
    lines.push(`drop ${shown(drops[unit])} nats${shownInterval(sliceAt(run, "low")[unit], sliceAt(run, "high")[unit])}${exact ? "" : ", estimated"}`);
    const q = sliceAt(run, "q")[unit];
    if (!Number.isNaN(q)) lines.push(`q of the drop ${q < 0.001 ? "< 0.001" : shown(q, 2)}`);
  }
  if (ranked.has(unit)) lines.push(`rank ${ranked.get(unit)} of ${ranked.size}`);
  const gradient = valuesAt(run, "gradient");
  if (gradient && !Number.isNaN(gradient[unit])) lines.push(`gradient ${shown(gradient[unit], 2)}`);
  const prefix = run.units.scores.prefix_matching;
  if (prefix && !Number.isNaN(prefix[unit])) lines.push(`prefix matching ${shown(prefix[unit], 2)}`);
  return lines;
}

// Where a unit stands on the map: its column and its layer; an empty column parts heads from FFNs.
function cellOf(run, unit) {
  const width = run.model.heads + 1;
  return [unit % width + (isFfn(run, unit) ? 1 : 0), Math.floor(unit / width)];
}

function drawMap(run) {
  const metric = run.units.metrics[state.metric];
  if (!metric) return;
  const values = valuesAt(run, state.metric), significant = significantAt(run), kept = sliceAt(run, "kept");
  const cells = { x: [], y: [], colour: [], unit: [], value: [], more: [] }, stars = { x: [], y: [] }, kepts = { x: [], y: [] };
  const ranked = ranks(values), marked = state.significant;
  for (let unit = 0; unit < values.length; unit++) {
    const [x, y] = cellOf(run, unit), visible = !marked || significant[unit];
    cells.x.push(x); cells.y.push(y);
    cells.colour.push(visible ? onScale(metric, values[unit]) : NaN);
    cells.unit.push(unitName(run, unit));
    cells.value.push(Number.isNaN(values[unit]) ? "not measured" : `${shown(values[unit])} ${metric.unit}`);
    cells.more.push(describeUnit(run, unit, ranked).join("; "));
    if (significant[unit]) { stars.x.push(x); stars.y.push(y); }
    if (kept[unit]) { kepts.x.push(x); kepts.y.push(y); }
  }
  fill("cells", cells); fill("stars", stars); fill("kept", kepts);
  const induction = { x: [], y: [] }, prefix = run.units.scores.prefix_matching;
  if (prefix) prefix.forEach((score, unit) => {
    if (score >= run.inductionScore) { const [x, y] = cellOf(run, unit); induction.x.push(x); induction.y.push(y); }
  });
  fill("induction", induction);
  drawProfile(run, values, metric);
  drawScale(run, metric);
  drawChosen(run);
}

function drawProfile(run, values, metric) {
  const columns = { y: [], mean: [], label: [] }, { layers, heads } = run.model;
  for (let layer = 0; layer < layers; layer++) {
    const own = [...values.subarray(layer * (heads + 1), layer * (heads + 1) + heads)].filter((v) => !Number.isNaN(v));
    const mean = own.length ? own.reduce((a, b) => a + b, 0) / own.length : NaN;
    columns.y.push(layer); columns.mean.push(mean); columns.label.push(`layer ${layer}: ${shown(mean)} ${metric.unit}`);
  }
  fill("layers", columns);
}

function drawScale(run, metric) {
  const bar = source("scale"), mapper = source("mapper");
  if (!bar) return;
  mapper.palette = paletteOf(run, metric);
  mapper.low = metric.signed ? -1 : 0;
  const ticks = scaleTicks(metric), places = ticks.map((value) => onScale(metric, value));
  bar.ticker.ticks = places;
  bar.title = metric.unit;
  bar.major_label_overrides = new Map(ticks.map((value, i) => [places[i], shown(value, 1)]));
}

function drawChosen(run) {
  const at = state.unit === null ? null : cellOf(run, state.unit);
  fill("chosen", at ? { x: [at[0]], y: [at[1]] } : { x: [], y: [] });
}

function drawCard(run) {
  const card = document.getElementById("unit");
  if (!card) return;
  const metric = run.units.metrics[state.metric];
  if (state.unit === null || !metric) { card.replaceChildren(element("p", { class: "soft" }, "Click a unit of the map, or type its name above, to see what it costs every task, and which masks keep it.")); return; }
  const unit = state.unit, head = element("tr", {}, element("th", {}, "shots"), ...run.shots.map((n) => element("th", {}, n === null ? "given" : String(n))));
  const rows = run.tasks.map((task) => element("tr", { class: task === state.task ? "chosen" : "" }, element("td", {}, taskName(task)),
    ...run.shots.map((shots) => {
      const index = settingIndex(run, task, shots) * run.perSetting + unit;
      return element("td", { "data-cell": `${task}|${shots}` }, shown(metric.values[index], 2) + (significantAt(run, task, shots)[unit] ? "*" : ""));
    })));
  const keepers = run.masks.filter(({ task, shots }) => run.units.kept[settingIndex(run, task, shots) * run.perSetting + unit]);
  card.replaceChildren(
    element("h3", {}, unitName(run, unit)),
    element("p", {}, describeUnit(run, unit, ranks(valuesAt(run, state.metric))).join("; ")),
    element("p", { class: "soft" }, `${metric.label}, ${metric.unit}; *: q ≤ 0.05 of the ${claimedText(run)}`),
    element("div", { class: "scroll" }, element("table", {}, head, ...rows)),
    element("p", { class: "soft" }, keepersText(run, keepers)));
}

const MOST_KEEPERS = 12;
function keepersText(run, keepers) {
  const all = run.masks.length, count = keepers.length;
  if (!all) return "";
  if (!count || count === all) return `Kept by ${count ? "all" : "none"} of ${all} greedy masks.`;
  const named = keepers.slice(0, MOST_KEEPERS).map((mask) => `${taskName(mask.task)} at ${mask.shots}`).join(", ");
  return `Kept by ${count} of ${all} greedy masks: ${named}${count > MOST_KEEPERS ? ", …" : ""}.`;
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The atlas: every setting as a small picture, painted cell by cell, in the scale of the map.
function makeAtlas(run) {
  const place = document.getElementById("atlas");
  if (!place || !Object.keys(run.units.metrics).length) return;
  const small = (task, shows) => {
    const text = shows.short ?? shotsText(shows.shots);
    const made = element("button", { type: "button", "data-task": task, "aria-label": `${taskName(task)}, ${text}` },
      element("canvas", { width: run.model.heads + 2, height: run.model.layers, "aria-hidden": "true" }), text);
    if (shows.short) made.dataset.group = shows.short; else made.dataset.shots = shows.shots;
    made.addEventListener("click", () => choose(run, shows.short ? { task, metric: metricOf(run, shows.short) } : { task, shots: shows.shots }));
    return made;
  };
  // One run: a map per shot count. Several: a map per run and difference.
  const group = Object.values(run.units.metrics)[0].group;
  const shown = group ? Object.values(run.units.metrics).filter((metric) => metric.group === group) : run.shots.map((shots) => ({ shots }));
  place.style.setProperty("--maps", shown.length);
  place.append(...run.tasks.map((task) => element("div", {}, element("b", {}, taskName(task)), ...shown.filter((each) => each.short || isSetting(run, task, each.shots)).map((each) => small(task, each)))));
}

// Of several runs: the metric of the chosen one's kind that shows this run or difference.
function metricOf(run, short) {
  const { group } = run.units.metrics[state.metric];
  return Object.keys(run.units.metrics).find((name) => run.units.metrics[name].group === group && run.units.metrics[name].short === short);
}

function drawAtlas(run) {
  const metric = run.units.metrics[state.metric];
  if (!metric) return;
  // A pixel as one number, red in the lowest byte.
  const colours = paletteOf(run, metric).map((hex) => [1, 3, 5].reduce((sum, at, byte) => sum + parseInt(hex.slice(at, at + 2), 16) * 256 ** byte, 255 * 256 ** 3));
  for (const button of document.querySelectorAll("#atlas button")) {
    const { task, group } = button.dataset, shots = group ? state.shots : readShots(button.dataset.shots), name = group ? metricOf(run, group) : state.metric;
    button.setAttribute("aria-pressed", String(task === state.task && shots === state.shots && name === state.metric));
    const canvas = button.firstElementChild, { width, height } = canvas, context = canvas.getContext("2d");
    const picture = context.createImageData(width, height), pixels = new Uint32Array(picture.data.buffer), values = valuesAt(run, name, task, shots);
    const significant = significantAt(run, task, shots), marked = state.significant;
    for (let unit = 0; unit < values.length; unit++) {
      if (Number.isNaN(values[unit]) || (marked && !significant[unit])) continue;
      const at = onScale(metric, values[unit]), share = metric.signed ? (at + 1) / 2 : Math.max(0, at);
      const [x, layer] = cellOf(run, unit);
      pixels[(height - 1 - layer) * width + x] = colours[Math.round(share * (colours.length - 1))];
    }
    context.putImageData(picture, 0, 0);
  }
}
