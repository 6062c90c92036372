// Units ranked: a table that sorts, and all of them as CSV.

const ROWS_AT_FIRST = 25;
let rowsShown = ROWS_AT_FIRST;

function unitRows(run) {
  const values = valuesAt(run, state.metric);
  if (!values) return [];
  const isDrop = state.metric === DROP;
  const at = (name) => valuesAt(run, name), q = sliceAt(run, "q"), low = sliceAt(run, "low"), high = sliceAt(run, "high");
  const significant = significantAt(run), kept = sliceAt(run, "kept"), gradient = at("gradient"), ranked = ranks(values);
  const claims = run.units.significant[DROP]?.subarray(settingIndex(run, state.task, state.shots) * run.perSetting);
  const scores = run.units.scores, searched = run.masks.some((m) => m.task === state.task && m.shots === state.shots);
  const rows = [];
  values.forEach((value, unit) => {
    if (Number.isNaN(value) || !isShown(run, significant, unit)) return;
    rows.push({ unit, claimed: claims ? claims[unit] : 0, rank: ranked.get(unit), value, low: isDrop ? low[unit] : NaN, high: isDrop ? high[unit] : NaN, q: q[unit],
      gradient: gradient ? gradient[unit] : NaN, prefix: scores.prefix_matching ? scores.prefix_matching[unit] : NaN,
      copying: scores.copying ? scores.copying[unit] : NaN, kept: searched ? kept[unit] : NaN });
  });
  return rows;
}

function sorted(rows) {
  const key = state.sort === "low" ? "value" : state.sort, sign = state.ascending ? 1 : -1;
  const missing = (row) => Number.isNaN(row[key]);
  return rows.sort((a, b) => missing(a) - missing(b) || sign * (a[key] - b[key]) || a.unit - b.unit);
}

function drawUnits(run) {
  const body = document.getElementById("unit-rows");
  if (!body) return;
  const rows = sorted(unitRows(run)), visible = rows.slice(0, rowsShown);
  const ends = visible.flatMap((row) => [row.value, row.low, row.high]).filter((v) => !Number.isNaN(v));
  const from = Math.min(0, ...ends), to = Math.max(0, ...ends, from + 1e-9);
  const percent = (value) => (100 * (value - from)) / (to - from);
  body.replaceChildren(...visible.map((row) => element("tr", { "data-unit": row.unit, class: row.unit === state.unit ? "chosen" : "" },
    element("td", {}, String(row.rank)), element("td", { class: "text" }, element("button", { type: "button", class: "plain" }, unitName(run, row.unit))), element("td", {}, shown(row.value)),
    element("td", {}, intervalBar(row, percent)), element("td", {}, shownInterval(row.low, row.high).trim()),
    element("td", {}, Number.isNaN(row.q) ? "" : (row.q < 0.001 ? "< 0.001" : shown(row.q, 2)) + (row.claimed ? "*" : "")),
    element("td", {}, shown(row.gradient, 2)), element("td", {}, shown(row.prefix, 2)), element("td", {}, shown(row.copying, 2)), element("td", {}, row.kept === 1 ? "kept" : ""))));
  hideEmptyColumns(rows);
  document.getElementById("unit-count").textContent = rows.length === 0 ? (state.significant ? "No unit is significant here." : "Nothing was measured here.") : `${visible.length} of ${rows.length} units${state.significant ? ` with q ≤ 0.05 of the ${claimedText(run)}` : ""}, ${run.units.metrics[state.metric].label} in ${run.units.metrics[state.metric].unit}: ${taskName(state.task)}, ${shotsText(state.shots)}.`;
  document.getElementById("unit-more").hidden = visible.length === rows.length;
  for (const button of document.querySelectorAll("[data-sort]")) button.parentElement.setAttribute("aria-sort", button.dataset.sort === state.sort ? (state.ascending ? "ascending" : "descending") : "none");
}

// Bounds, claims and scores that nothing was measured for have no column.
function hideEmptyColumns(rows) {
  const measured = (key) => rows.some((row) => !Number.isNaN(row[key]));
  document.querySelectorAll("[data-sort]").forEach((button, index) => {
    const hidden = !["rank", "unit", "value"].includes(button.dataset.sort) && rows.length > 0 && !measured(button.dataset.sort === "high" ? "low" : button.dataset.sort);
    for (const row of document.querySelectorAll("table.units tr")) if (row.cells[index]) row.cells[index].hidden = hidden;
  });
}

function intervalBar(row, percent) {
  const bar = element("span", { class: "interval", "aria-hidden": "true" });
  const part = (tag, style) => { const made = document.createElement(tag); Object.assign(made.style, style); bar.append(made); };
  part("u", { left: `${percent(0)}%` });
  if (!Number.isNaN(row.low)) part("i", { left: `${percent(row.low)}%`, width: `${percent(row.high) - percent(row.low)}%` });
  part("b", { left: `${percent(row.value)}%` });
  return bar;
}

function unitsAsCsv(run) {
  const columns = ["rank", "value", "low", "high", "q", "gradient", "prefix", "copying", "kept"];
  const cell = (value) => (Number.isNaN(value) ? "" : String(value));
  const lines = sorted(unitRows(run)).map((row) => [unitName(run, row.unit), ...columns.map((name) => cell(row[name]))].join(","));
  return [["unit", ...columns].join(","), ...lines].join("\n") + "\n";
}

function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function makeUnits(run) {
  document.getElementById("unit-rows")?.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row) choose(run, { unit: Number(row.dataset.unit) });
  });
  for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () =>
    choose(run, { sort: button.dataset.sort, ascending: state.sort === button.dataset.sort ? !state.ascending : button.dataset.sort === "rank" || button.dataset.sort === "q" || button.dataset.sort === "unit" }));
  document.getElementById("unit-more")?.addEventListener("click", () => { rowsShown = rowsShown === ROWS_AT_FIRST ? 100 : rowsShown + 100; drawUnits(run); });
  document.getElementById("unit-csv")?.addEventListener("click", () => download(`units-${fileName(state.task)}-${state.shots}shot.csv`, "text/csv", unitsAsCsv(run)));
}

const fileName = (text) => text.replace(/[^A-Za-z0-9._+]+/g, "-");

// A greedy mask as a mask file, for `evaluate --mask`.
function maskFile(run, task, shots) {
  const { id, revision, model_type, layers, heads, digest } = run.model, removed = { heads: {}, ffns: [] };
  const kept = sliceAt(run, "kept", task, shots), mask = run.masks.find((m) => m.task === task && m.shots === shots);
  for (let unit = 0; unit < kept.length; unit++) {
    if (kept[unit]) continue;
    const layer = Math.floor(unit / (heads + 1));
    if (isFfn(run, unit)) removed.ffns.push(layer); else (removed.heads[layer] ??= []).push(unit % (heads + 1));
  }
  return JSON.stringify({ format: "lowmem-icl-mask/1", name: mask.name, ablation: "zero", model: { id, revision, model_type, layers, heads, digest }, removed, made: mask.made, scores: mask.scores }, null, 1) + "\n";
}

function makeMasks(run) {
  document.getElementById("masks")?.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-name], [data-command]");
    if (!button) return;
    const { task, shots, command } = button.dataset;
    if (command === undefined) download(`${button.dataset.name}.json`, "application/json", maskFile(run, task, Number(shots)));
    // Pages that come over a plain network have no clipboard.
    else try { await navigator.clipboard.writeText(command); button.textContent = "copied"; } catch { button.textContent = command; }
  });
}
