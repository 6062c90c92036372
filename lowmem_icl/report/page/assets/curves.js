// Curves, dots and matrices: what the chosen task and shot count show of the run's small tables.

const inkOn = (hex) => {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255).map((v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.3 ? "#1b1f24" : "#ffffff";
};

// Moved apart to at least the gap, none below the bottom or above the top: up first, then down from the top.
function spread(places, gap, bottom, top) {
  const order = [...places.keys()].sort((a, b) => places[a] - places[b]), moved = [...places];
  if (order.length) moved[order[0]] = Math.max(moved[order[0]], bottom);
  for (let i = 1; i < order.length; i++) moved[order[i]] = Math.max(moved[order[i]], moved[order[i - 1]] + gap);
  for (let i = order.length - 1, limit = top; i >= 0; i--, limit = moved[order[i + 1]] - gap) moved[order[i]] = Math.min(moved[order[i]], limit);
  return moved;
}

// What is shown where a curve is not of the chosen task: the mean over tasks has none of its own everywhere.
function drawCurves(name, curves, { unit, height }) {
  const atShots = curves.filter((c) => c.shots === state.shots || c.shots === null);
  const own = atShots.filter((c) => c.task === state.task && !c.random), random = atShots.find((c) => c.random && (c.task === state.task || c.task === null));
  const behind = atShots.filter((c) => c.task !== state.task && !c.random);
  const filled = (values, fallback) => values.map((v, i) => (v === null ? fallback[i] : v));
  fill(`${name}-band`, random ? { x: random.x, low: filled(random.low, random.y), high: filled(random.high, random.y) } : { x: [], low: [], high: [] });
  fill(`${name}-behind`, { xs: behind.map((c) => c.x), ys: behind.map((c) => c.y) });
  // Of curves that cover each other the task's own is wide, others are narrow and above it.
  const front = [...(random ? [random] : []), ...own], width = (curve) => (curve.label === "own ranking" ? 4 : 1.8);
  fill(`${name}-lines`, { xs: front.map((c) => c.x), ys: front.map((c) => c.y), colour: front.map((c) => onTheme(c.colour)), width: front.map(width) });
  const points = { x: [], y: [], low: [], high: [], colour: [], label: [], text: [] };
  for (const curve of own) curve.x.forEach((x, i) => {
    points.x.push(x); points.y.push(curve.y[i]); points.low.push(curve.low[i] ?? curve.y[i]); points.high.push(curve.high[i] ?? curve.y[i]); points.colour.push(onTheme(curve.colour));
    points.label.push(`${taskName(state.task)}, ${shotsText(state.shots)}, ${curve.label}`); points.text.push(`${shown(x)} of ${curve.units} ${unit}: ${shown(curve.y[i])}${shownInterval(curve.low[i], curve.high[i])}`);
  });
  fill(`${name}-points`, points);
  const knees = own.filter((c) => c.knee !== null).map((c) => ({ x: c.knee, y: c.y[c.x.indexOf(c.knee)], colour: onTheme(c.colour) })).filter((k) => k.y !== undefined);
  fill(`${name}-marks`, { x: knees.map((k) => k.x), y: knees.map((k) => k.y), colour: knees.map((k) => k.colour) });
  const last = (values) => values[values.length - 1] ?? 0, labelled = front.filter((c) => c.x.length);
  fill(`${name}-labels`, { x: labelled.map((c) => last(c.x)), y: spread(labelled.map((c) => last(c.y)), 17 / height, 0.05, 0.98), text: labelled.map((c) => c.label), colour: labelled.map((c) => onTheme(c.colour)) });
  const plot = source(name), reach = Math.max(1e-9, ...atShots.flatMap((c) => c.x));
  if (plot) { plot.x_range.start = -0.02 * reach; plot.x_range.end = reach * (plot.inner_width > 420 ? 1.35 : 1.6); plot.below.forEach((axis) => { axis.bounds = [0, reach]; }); }
  const chance = front.map((c) => c.chance).find((v) => v !== null && v !== undefined), far = Math.max(0, ...front.flatMap((c) => c.x));
  fill(`${name}-level`, chance === undefined ? { xs: [], ys: [] } : { xs: [[0, far]], ys: [[chance, chance]] });
}

function markAxis(axis, metric) {
  const ticks = scaleTicks(metric);
  axis.axis_label = `${metric.label}, ${metric.unit}`;
  axis.ticker.ticks = ticks.map((value) => onScale(metric, value));
  axis.major_label_overrides = new Map(ticks.map((value) => [onScale(metric, value), shown(value, 1)]));
}

function drawScores(run) {
  const prefix = run.units.scores.prefix_matching, values = valuesAt(run, state.metric), metric = run.units.metrics[state.metric];
  if (!prefix || !values) return;
  const columns = { x: [], y: [], unit: [], text: [] };
  values.forEach((value, unit) => {
    if (Number.isNaN(value) || Number.isNaN(prefix[unit])) return;
    columns.x.push(prefix[unit]); columns.y.push(onScale(metric, value)); columns.unit.push(unitName(run, unit));
    columns.text.push(`prefix matching ${shown(prefix[unit], 2)}, ${shown(value)} ${metric.unit}`);
  });
  fill("head-scores", columns);
  const plot = source("scores");
  if (plot) markAxis(plot.left.find((a) => a.axis_label !== undefined), metric);
}

// Restored against broken, heads and FFNs apart; both axes in the scales of the map.
const RESTORED = "restore_gold_logprob", BROKEN = "break_gold_logprob";
function drawPatched(run) {
  const [across, up] = [RESTORED, BROKEN].map((name) => run.units.metrics[name]), plot = source("patched");
  if (!plot || !across || !up) return;
  const x = valuesAt(run, RESTORED), y = valuesAt(run, BROKEN), kinds = [0, 1].map(() => ({ x: [], y: [], unit: [], text: [], filled: [] }));
  const start = settingIndex(run, state.task, state.shots) * run.perSetting, claimed = (unit) => [RESTORED, BROKEN].some((name) => run.units.significant[name]?.[start + unit]);
  x.forEach((value, unit) => {
    if (Number.isNaN(value) || Number.isNaN(y[unit])) return;
    const columns = kinds[Number(isFfn(run, unit))];
    columns.x.push(onScale(across, value)); columns.y.push(onScale(up, y[unit])); columns.unit.push(unitName(run, unit)); columns.filled.push(claimed(unit) ? 0.8 : 0.05);
    columns.text.push(`restores ${shown(value)}, breaks ${shown(y[unit])} nats`);
  });
  fill("patched-heads", kinds[0]); fill("patched-ffns", kinds[1]);
  for (const [axes, metric, range, name] of [[plot.below, across, plot.x_range, "x"], [plot.left, up, plot.y_range, "y"]]) {
    markAxis(axes.find((a) => a.axis_label !== undefined), metric);
    const ends = [0, ...kinds.flatMap((columns) => columns[name])];
    range.start = Math.min(-0.2, ...ends) - 0.05; range.end = Math.max(0.2, ...ends) + 0.05;
  }
}

function drawRemoval(run) {
  const plot = source("removal");
  if (!plot) return;
  const rows = run.removal.filter((row) => row.shots === state.shots).map((row) => ({ ...row, task: taskName(row.task) })), tasks = [...new Set(rows.map((row) => row.task))];
  plot.y_range.factors = tasks.slice().reverse();
  const ends = rows.flatMap((row) => [row.value, row.low ?? row.value, row.high ?? row.value]), from = Math.min(0, ...ends), to = Math.max(0.05, ...ends);
  plot.x_range.start = from - 0.04 * (to - from); plot.x_range.end = to + 0.04 * (to - from);
  const part = (method, words) => {
    const own = rows.filter((row) => row.method === method);
    return { task: own.map((r) => r.task), value: own.map((r) => r.value), low: own.map((r) => r.low ?? r.value), high: own.map((r) => r.high ?? r.value),
      text: own.map((r) => `${words.replace("N", r.heads_removed)}: ${shown(r.value)} lost${shownInterval(r.low, r.high)}, ${r.documents} documents`) };
  };
  fill("removal-induction", part("induction", "without N induction heads"));
  fill("removal-random", part("random-median", "without N random heads, median"));
}

// measured: {row, column, value, text}; the colour is `scaled`, from -1 to 1. Cells without a value stay empty.
function drawMatrix(run, name, rows, columns, measured, scaled, kind) {
  const plot = source(name), cells = measured.filter((cell) => cell.value !== null && !Number.isNaN(cell.value));
  if (!plot) return;
  plot.x_range.factors = columns; plot.y_range.factors = rows.slice().reverse();
  const palette = run.palettes[kind][theme()], mapper = source(`${name}-mapper`);
  mapper.palette = palette; mapper.low = kind === "signed" ? -1 : 0;
  const ink = (value) => inkOn(palette[Math.round(Math.min(1, Math.max(0, kind === "signed" ? (value + 1) / 2 : value)) * (palette.length - 1))]);
  const wide = (plot.inner_width || 500) / Math.max(1, columns.length) > 30;
  fill(`${name}-cells`, { row: cells.map((c) => c.row), column: cells.map((c) => c.column), value: cells.map((c) => c.value), colour: cells.map((c) => scaled(c.value)),
    shown: cells.map((c) => (wide ? c.value.toFixed(2) : "")), ink: cells.map((c) => ink(scaled(c.value))), text: cells.map((c) => c.text) });
}

function drawAgreement(run) {
  const found = run.agreement.find((each) => each.shots === state.shots);
  if (!found) { drawMatrix(run, "agreement", [], [], [], (v) => v, "signed"); return; }
  const cells = found.tasks.flatMap((row, i) => found.tasks.map((column, j) => ({ row, column, value: found.values[i][j], text: `rank correlation ${shown(found.values[i][j])} at ${shotsText(found.shots)}` })));
  drawMatrix(run, "agreement", found.tasks, found.tasks, cells, (value) => value, "signed");
  const axis = source("agreement")?.below.find((each) => "axis_label" in each);
  if (axis) axis.axis_label = found.ceiling === null ? "" : `ceiling ${shown(found.ceiling, 2)}`;
}

function drawGrid(run) {
  const points = run.grid.filter((point) => point.task === state.task && point.shots === state.shots), numbers = (name) => [...new Set(points.map((point) => point[name]))].sort((a, b) => a - b).map(String);
  const cells = points.map((point) => ({ row: String(point.heads_removed), column: String(point.ffns_removed), value: point.value,
    text: `${point.heads_removed} heads and ${point.ffns_removed} FFNs removed: ${shown(point.value)}${shownInterval(point.low, point.high)}` }));
  drawMatrix(run, "grid", numbers("heads_removed"), numbers("ffns_removed"), cells, (value) => value, "unsigned");
}

function drawTransfer(run) {
  const rows = run.transfer.filter((row) => row.shots === state.shots), tasks = run.tasks.filter((task) => rows.some((row) => row.task === task));
  const clean = new Map(rows.filter((row) => row.clean).map((row) => [row.task, row]));
  const cells = rows.filter((row) => !row.clean).map((row) => ({ row: row.mask_task, column: row.task, value: row.value - (clean.get(row.task)?.value ?? NaN),
    text: `${row.task} under the mask of ${row.mask_task}: ${shown(row.value)}${shownInterval(row.low, row.high)}, clean ${shown(clean.get(row.task)?.value)}, ${row.documents} documents` }));
  const masks = run.tasks.filter((task) => cells.some((cell) => cell.row === task));
  drawMatrix(run, "transfer", masks, tasks, cells, (value) => Math.max(-1, Math.min(1, -value)), "signed");
}
