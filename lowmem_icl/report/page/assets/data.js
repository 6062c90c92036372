// Encoded arrays to typed arrays, and the axes they have. The form is that of encoding.py and unit_arrays.py.

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

const HALVES = new Float32Array(65536).map((_, bits) => halfToNumber(bits));

async function decodeHalves({ text, scale }) {
  const bytes = await inflate(text), count = bytes.length / 2, values = new Float32Array(count);
  for (let i = 0; i < count; i++) values[i] = scale * HALVES[(bytes[i] << 8) | bytes[count + i]];
  return values;
}

async function decodeBits({ text }) {
  const bytes = await inflate(text), flags = new Uint8Array(bytes.length * 8);
  for (let i = 0; i < flags.length; i++) flags[i] = (bytes[i >> 3] >> (7 - (i & 7))) & 1;
  return flags;
}

// A run with its arrays decoded: metrics[name].values and the rest by setting and unit.
async function decodeRun(run) {
  const units = run.units, { layers, heads } = run.model;
  run.perSetting = layers * (heads + 1);
  const values = async (encoded) => decodeHalves(encoded);
  await Promise.all([
    ...Object.values(units.metrics).map(async (metric) => { metric.values = await values(metric.values); }),
    ...["low", "high", "q"].map(async (name) => { units[name] = await values(units[name]); }),
    ...["exact", "kept"].map(async (name) => { units[name] = await decodeBits(units[name]); }),
    ...Object.keys(units.significant).map(async (name) => { units.significant[name] = await decodeBits(units.significant[name]); }),
    ...Object.keys(units.scores).map(async (name) => { units.scores[name] = await values(units.scores[name]); }),
  ]);
  return run;
}

// Prompts that were given have no shot count: null, in texts "null".
const readShots = (text) => (text === "null" ? null : Number(text));
const isSetting = (run, task, shots) => run.settings.some(([name, count]) => name === task && count === shots);
const settingIndex = (run, task, shots) => run.tasks.indexOf(task) * run.shots.length + run.shots.indexOf(shots);
const unitName = (run, unit) => {
  const width = run.model.heads + 1, head = unit % width, layer = Math.floor(unit / width);
  return head === run.model.heads ? `L${layer}F` : `L${layer}H${head}`;
};
function unitIndex(run, name) {
  const match = /^L(\d+)(?:H(\d+)|F)$/i.exec(name.trim());
  if (!match || +match[1] >= run.model.layers || (match[2] !== undefined && +match[2] >= run.model.heads)) return null;
  return +match[1] * (run.model.heads + 1) + (match[2] === undefined ? run.model.heads : +match[2]);
}
const isFfn = (run, unit) => unit % (run.model.heads + 1) === run.model.heads;

// Where a value lies on the symmetric-logarithmic scale of its metric, from -1 to 1.
function onScale(metric, value) {
  // Of a metric that is 0 everywhere all lie in the middle.
  const top = Math.log1p(metric.largest / metric.linear) || 1;
  return (Math.sign(value) * Math.log1p(Math.abs(value) / metric.linear)) / top;
}
function scaleTicks(metric) {
  const powers = [];
  for (let p = Math.ceil(Math.log10(metric.linear)); 10 ** p <= metric.largest * 1.0001; p++) powers.push(10 ** p);
  const kept = powers.filter((_, i) => (powers.length - 1 - i) % Math.max(1, Math.ceil(powers.length / 4)) === 0);
  return metric.signed ? [...kept.map((v) => -v).reverse(), 0, ...kept] : [0, ...kept];
}

const shown = (value, digits = 3) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000 || size < 0.001) return value.toExponential(1);
  return size >= 1 && digits < 2 ? String(Number(value.toPrecision(digits))) : value.toPrecision(digits);
};
const shotsText = (count) => (count === null ? "given prompts" : `${count} ${count === 1 ? "shot" : "shots"}`);
const taskName = (task) => (task === "aggregate" ? "mean over tasks" : task);
const shownInterval = (low, high) => (Number.isNaN(low) || low == null || high == null ? "" : ` [${shown(low, 2)}, ${shown(high, 2)}]`);
