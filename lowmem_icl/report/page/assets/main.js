// From the page's data to the page: decode, embed the plots one by one, and redraw what a choice changes.

const plots = [];
const theme = () => document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
const paletteOf = (run, metric) => run.palettes[metric.signed ? "signed" : "unsigned"][theme()];

const PER_PLOT = {
  "plot-map": drawMap,
  "plot-prune-heads": (run) => drawCurves("prune-heads", run.curves.head, { unit: "heads", height: 240 }),
  "plot-prune-ffns": (run) => drawCurves("prune-ffns", run.curves.ffn, { unit: "FFNs", height: 240 }),
  "plot-grid": drawGrid,
  "plot-transfer": drawTransfer,
  "plot-scores": drawScores,
  "plot-patched": drawPatched,
  "plot-removal": drawRemoval,
  "plot-prefix-capacity": (run) => drawCurves("prefix-capacity", run.capacity.prefix_matching, { unit: "% of heads", height: 180 }),
  "plot-copying-capacity": (run) => drawCurves("copying-capacity", run.capacity.copying, { unit: "% of heads", height: 180 }),
  "plot-agreement": drawAgreement,
};

// The dark blue of light pages is too dark on dark ones.
const DARK_BLUE = "#0072B2", LIGHT_BLUE = "#5cb3ff";
function recolour(model) {
  const [from, to] = theme() === "dark" ? [DARK_BLUE, LIGHT_BLUE] : [LIGHT_BLUE, DARK_BLUE];
  for (const name of ["line_color", "fill_color", "text_color"]) if (model[name] === from || model[name]?.value === from) model[name] = to;
}
const onTheme = (colour) => (theme() === "dark" && colour === DARK_BLUE ? LIGHT_BLUE : colour);

function paintPlots() {
  const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--soft").trim();
  const names = { axis: ["axis_label_text_color", "major_label_text_color"], line: ["axis_line_color", "major_tick_line_color"] };
  for (const document of plots) for (const model of document._all_models.values()) {
    if ("axis_line_color" in model) {
      for (const name of names.axis) model[name] = ink;
      for (const name of names.line) model[name] = line;
    } else if ("label_text_color" in model) model.label_text_color = ink;
    else if ("color_mapper" in model && "major_label_text_color" in model) model.major_label_text_color = model.title_text_color = ink;
    recolour(model);
    if (["kept-mark", "induction-mark"].includes(model.name) && model.glyph) model.glyph.line_color = ink;
    if (model.name === "star-mark") model.glyph.fill_color = ink;
  }
}

// What a choice changes: an order the table alone, a unit its marks and its card, all else everything.
function redraw(run, changes = {}) {
  const names = Object.keys(changes), only = (...some) => names.length > 0 && names.every((name) => some.includes(name));
  if (only("sort", "ascending")) { drawUnits(run); return; }
  if (only("unit")) { drawChosen(run); drawCard(run); drawUnits(run); return; }
  for (const id of run.embedded) PER_PLOT[id]?.(run);
  drawAtlas(run); drawCard(run); drawUnits(run); markMasks(run);
  const at = document.getElementById("at-chance"), values = valuesAt(run, state.metric);
  document.getElementById("nothing").textContent = values && values.every(Number.isNaN) ? `Nothing measured here: ${run.units.metrics[state.metric].label}, ${taskName(state.task)}, ${shotsText(state.shots)}.` : "";
  at.textContent = run.atChance.some(([task, shots]) => task === state.task && shots === state.shots) ? "At chance: the clean model is no better than guessing here." : "";
}

const MOST_LISTED = 300;
function markMasks(run) {
  const place = document.getElementById("kept-units"), mask = run.masks.find((each) => each.task === state.task && each.shots === state.shots);
  if (place) place.textContent = mask ? keptText(run) : "";
  for (const row of document.querySelectorAll("tr[data-task]")) row.classList.toggle("chosen", row.dataset.task === state.task && readShots(row.dataset.shots) === state.shots);
}

function keptText(run) {
  const kept = [...sliceAt(run, "kept").entries()].filter(([, flag]) => flag).map(([unit]) => unit).filter((unit) => unit < run.perSetting);
  const drops = valuesAt(run, DROP), by = (unit) => (drops && !Number.isNaN(drops[unit]) ? drops[unit] : -Infinity);
  const names = kept.sort((a, b) => by(b) - by(a)).map((unit) => unitName(run, unit));
  return `${taskName(state.task)}, ${shotsText(state.shots)}: the greedy mask keeps ${names.length} of ${run.perSetting} units, the costliest alone first: ${names.slice(0, MOST_LISTED).join(" ")}${names.length > MOST_LISTED ? " …" : ""}`;
}

function makeBar(run) {
  const bar = document.getElementById("bar"), fields = bar.elements, option = (value, text) => element("option", { value }, text);
  fields.task.append(...run.tasks.map((task) => option(task, taskName(task))));
  fields.shots.append(...run.shots.map((shots) => option(shots, shots === null ? shotsText(shots) : String(shots))));
  fields.metric.append(...Object.entries(run.units.metrics).map(([name, { label }]) => option(name, label)));
  // What a run has not measured cannot be chosen.
  const hasUnits = Object.keys(run.units.metrics).length > 0, hasMore = [run.curves.head, run.curves.ffn, run.removal, run.agreement].some((rows) => rows.length);
  for (const name of ["metric", "significant", "unit"]) fields[name].closest("label").hidden = !hasUnits;
  bar.hidden = !hasUnits && !hasMore;
  const show = () => {
    fields.task.value = state.task; fields.shots.value = state.shots; fields.metric.value = state.metric; fields.significant.checked = state.significant;
    if (document.activeElement !== fields.unit) fields.unit.value = state.unit === null ? "" : unitName(run, state.unit);
  };
  show(); listeners.push(show);
  bar.addEventListener("submit", (event) => event.preventDefault());
  // Where one of both has no such other, the first that it has.
  fields.task.addEventListener("change", () => {
    const task = fields.task.value, shots = isSetting(run, task, state.shots) ? state.shots : run.settings.find(([name]) => name === task)[1];
    choose(run, { task, shots });
  });
  fields.shots.addEventListener("change", () => {
    const shots = readShots(fields.shots.value), task = isSetting(run, state.task, shots) ? state.task : run.settings.find(([, count]) => count === shots)[0];
    choose(run, { task, shots });
  });
  fields.metric.addEventListener("change", () => choose(run, { metric: fields.metric.value }));
  fields.significant.addEventListener("change", () => choose(run, { significant: fields.significant.checked }));
  fields.unit.addEventListener("change", () => findUnit(run, fields.unit.value));
  document.getElementById("masks")?.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-task]");
    if (row && !event.target.closest("[data-name], [data-command]")) choose(run, { task: row.dataset.task, shots: Number(row.dataset.shots) });
  });
}

function findUnit(run, text) {
  const problem = document.getElementById("unit-problem"), unit = text.trim() === "" ? null : unitIndex(run, text);
  const wrong = unit === null && text.trim() !== "";
  problem.textContent = wrong ? `no such unit; L0H0 to L${run.model.layers - 1}H${run.model.heads - 1}, or L0F` : "";
  if (!wrong) choose(run, { unit });
}

function moveByKeys(run) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: run.model.heads + 1, ArrowDown: -run.model.heads - 1 };
  const map = document.getElementById("plot-map");
  map?.setAttribute("tabindex", "0");
  map?.setAttribute("aria-label", "Map of heads and FFNs; arrow keys choose a unit, which is described beside it");
  map?.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    const unit = state.unit === null ? 0 : state.unit + steps[event.key];
    if (unit >= 0 && unit < run.perSetting) choose(run, { unit });
  });
}

async function embedPlots(run, items) {
  for (const [id, item] of Object.entries(items)) {
    await Bokeh.embed.embed_item(item, id);
    const document = Bokeh.documents[Bokeh.documents.length - 1];
    if (!plots.includes(document)) plots.push(document);
    run.embedded.push(id);
    paintPlots(); PER_PLOT[id]?.(run);
    if (id === "plot-map") source("cells")?.selected.properties.indices.change.connect(() => {
      const [index] = source("cells").selected.indices;
      if (index !== undefined) choose(run, { unit: index });
    });
    await new Promise((resume) => setTimeout(resume));
  }
}

async function start() {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const run = await decodeRun(read("run-data"));
  run.embedded = [];
  readAddress(run);
  makeBar(run); makeUnits(run); makeMasks(run); makeAtlas(run); moveByKeys(run);
  listeners.push((changes) => redraw(run, changes));
  redraw(run);
  const library = new TextDecoder().decode(await inflate(document.getElementById("bokeh-library").textContent.trim()));
  document.head.append(element("script", {}, library));
  Bokeh.logger.set_level("error");
  await embedPlots(run, read("plot-items"));
  const repaint = () => { paintPlots(); redraw(run); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  document.getElementById("theme").addEventListener("click", () => { document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark"; repaint(); });
  let before;
  const folded = () => document.querySelectorAll("details");
  addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme; for (const each of folded()) each.open = true; document.documentElement.dataset.theme = "light"; repaint(); });
  addEventListener("afterprint", () => { if (before === undefined) delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = before; repaint(); });
  addEventListener("hashchange", () => { readAddress(run); listeners.forEach((listener) => listener({})); });
  document.documentElement.dataset.ready = "yes";
}

start();
