// What the reader has chosen. It stands in the address, so that a view can be sent to others.

const state = { task: "", shots: 0, metric: "", significant: false, unit: null, sort: "value", ascending: false };
const listeners = [];

function readAddress(run) {
  const asked = new URLSearchParams(location.hash.slice(1));
  const metrics = Object.keys(run.units.metrics);
  state.task = run.tasks.includes(asked.get("task")) ? asked.get("task") : run.start.task;
  state.shots = asked.has("shots") && run.shots.includes(readShots(asked.get("shots"))) ? readShots(asked.get("shots")) : run.start.shots;
  state.metric = metrics.includes(asked.get("metric")) ? asked.get("metric") : firstMeasured(run, metrics);
  state.significant = asked.get("significant") === "1";
  state.unit = asked.has("unit") ? unitIndex(run, asked.get("unit")) : null;
}

// What a setting without drops shows first: the first metric that was measured there.
const firstMeasured = (run, metrics) => metrics.find((name) => !valuesAt(run, name).every(Number.isNaN)) ?? metrics[0] ?? "";

function writeAddress(run) {
  const parts = new URLSearchParams({ task: state.task, shots: state.shots, metric: state.metric });
  if (state.significant) parts.set("significant", "1");
  if (state.unit !== null) parts.set("unit", unitName(run, state.unit));
  history.replaceState(null, "", `#${parts}`);
}

function choose(run, changes) {
  Object.assign(state, changes);
  writeAddress(run);
  for (const listener of listeners) listener(changes);
}
