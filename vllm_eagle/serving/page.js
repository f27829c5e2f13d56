// Draws what eagle/data.json says, once a second. Text from the server is only ever set as text, never as markup.
"use strict";

const EVERY_MS = 1000;
const PATIENCE_MS = 5000;
const MOST_TREES = 4;
const MOST_DEPTHS = 16;
const HIDDEN = ' Words are not shown: "show_text": true in the server\'s "vllm_eagle" options shows them.';
const SMALLEST = 0.88; // trees shrink to this before they are scrolled
const DECISIONS = {
  tree: "got a tree",
  budget: "would not pay",
  no_room: "no room left",
  switched_off: "request wants none",
  grammar: "grammar not ready",
  buffer_full: "batch too large",
  left_behind: "head left behind",
  failed: "drafting failed",
};

const $ = (id) => document.getElementById(id);
let key = sessionStorage.getItem("vllm_eagle_key") || "";
let data = null; // the last answer
let goneSince = null; // when the server stopped answering
let timer = 0;
let held = false;
let drawn = ""; // what the trees on the page were drawn from

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function shape(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Live regions speak when they are written, so they are written only when they change.
function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

const number = (value, digits = 0) =>
  value === null || value === undefined
    ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => (value === null ? "–" : `${number(100 * value)} %`);
const span = () => document.querySelector("input[name=span]:checked").value;

// --- asking

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const answer = await fetch("eagle/data.json", {
      headers: key ? { Authorization: `Bearer ${key}` } : {},
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (answer.status === 401) return askForKey();
    const found = await answer.json();
    if (answer.ok) arrived(found);
    else gone(found.error || `The server answers with status ${answer.status}.`);
  } catch (error) {
    gone(null);
  }
  timer = setTimeout(poll, EVERY_MS);
}

function arrived(found) {
  data = found;
  goneSince = null;
  $("key-form").hidden = true;
  $("forget").hidden = !key;
  $("link").className = "live";
  say("link", "Live");
  $("data").classList.remove("stale");
  draw();
}

function gone(text) {
  goneSince = goneSince || new Date();
  $("link").className = "gone";
  say("link", `No data since ${goneSince.toLocaleTimeString("en-GB")}, trying again`);
  banner("bad", text || "The server does not answer. What is below is the last that it said.");
  $("data").classList.add("stale");
}

function askForKey() {
  const refused = Boolean(key);
  forget();
  if (refused) banner("warn", "That is not the API key of this server.");
  $("key").focus();
}

function forget() {
  key = "";
  sessionStorage.removeItem("vllm_eagle_key");
  clearTimeout(timer);
  $("data").hidden = true;
  $("forget").hidden = true;
  $("key-form").hidden = false;
  $("link").className = "";
  banner("", "");
  say("link", "Waiting for the API key");
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  $("key").value = "";
  sessionStorage.setItem("vllm_eagle_key", key);
  poll();
});
$("forget").addEventListener("click", forget);
$("hold").addEventListener("click", () => {
  held = !held;
  $("hold").setAttribute("aria-pressed", String(held));
  if (data) draw();
});
for (const input of document.querySelectorAll("input[name=span]")) input.addEventListener("change", () => data && draw());
document.addEventListener("visibilitychange", poll);
window.addEventListener("resize", () => data && data.trees && draw());

// --- drawing

function banner(level, text) {
  $("banner").className = `banner ${level}`;
  $("banner").hidden = !text;
  say("banner", text);
}

function draw() {
  say("model", data.trees ? `${data.model} · head ${data.head}` : data.model);
  const versions = Object.entries(data.versions).map(([name, version]) => `${name} ${version}`);
  say("about", [...versions, ...options(), `watching for ${duration(data.up_s)}`].join(" · "));
  $("data").hidden = !data.trees;
  document.title = data.trees ? `${data.minute.tau === null ? data.verdict : number(data.minute.tau, 2)} – Draft trees` : "Draft trees";
  if (!data.trees) {
    banner("", 'This server drafts no trees: it was started without "vllm_eagle" in --additional-config.');
    return;
  }
  drawBanner();
  $("now").className = data.level;
  say("verdict", data.verdict);
  $("tau").textContent = data.speculation_off ? "off" : number(data.minute.tau, 2);
  $("tau-total").textContent = number(data.total.tau, 2);
  drawChart();
  drawTiles();
  const shown = data[span()];
  drawDepths(shown);
  drawStages(shown);
  drawDecisions(shown);
  drawLoads(shown);
  if (!held) drawTrees();
}

function options() {
  if (!data.trees) return [];
  const { mode, num_draft_tokens, topk, max_depth, coupled } = data.options;
  const grown = mode === "dynamic" ? `, top ${topk}, depth ${max_depth}` : "";
  return [`${mode} trees of ${num_draft_tokens}${grown}`, coupled ? "coupled" : "uncoupled"];
}

function duration(seconds) {
  if (seconds < 120) return `${seconds} s`;
  return seconds < 7200 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`;
}

function drawBanner() {
  if (data.speculation_off) {
    banner("bad", "Speculation is OFF: drafting failed and was switched off. Answers go on, exact, one token per pass. The server's log holds the error; start the server anew to draft again.");
  } else if (data.problem) banner("warn", data.problem);
  else if (!data.counted) banner("warn", "No counters yet: the worker's file cannot be read here and the engine has not answered.");
  else if (data.silent_s > 3) banner("warn", `The engine has been busy for ${number(data.silent_s)} s and has not sent its last trees.`);
  else banner("", "");
}

function drawChart() {
  const taus = data.chart.taus;
  const width = Math.max($("chart").clientWidth, 200), height = $("chart").clientHeight || 150;
  const left = 22, right = width - 6, top = 8, bottom = height - 18;
  const most = Math.max(2, Math.ceil(Math.max(1, data.total.tau || 1, ...taus.filter((tau) => tau !== null)) + 0.2));
  const x = (i) => left + ((right - left) * i) / (taus.length - 1);
  const y = (tau) => bottom - ((bottom - top) * (tau - 1)) / (most - 1);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chartLabel() });
  const every = Math.ceil((most - 1) / 5);
  for (let tau = 1; tau <= most; tau += every) {
    svg.append(shape("line", { class: "grid", x1: left, x2: right, y1: y(tau), y2: y(tau) }));
    svg.append(shape("text", { class: "axis", x: left - 6, y: y(tau) + 4, "text-anchor": "end" }, String(tau)));
  }
  for (const [part, text, anchor] of [[0, "10 min ago", "start"], [0.5, "5 min", "middle"], [1, "now", "end"]]) {
    svg.append(shape("text", { class: "axis", x: left + (right - left) * part, y: height - 4, "text-anchor": anchor }, text));
  }
  if (data.total.tau !== null) {
    const mean = y(data.total.tau);
    svg.append(shape("line", { class: "mean", x1: left, x2: right, y1: mean, y2: mean }, shape("title", {}, "since start")));
  }
  let line = "";
  taus.forEach((tau, i) => {
    if (tau === null) return;
    const alone = taus[i - 1] == null && taus[i + 1] == null;
    if (alone) svg.append(shape("circle", { class: "dot", cx: x(i), cy: y(tau), r: 2 }));
    else line += `${taus[i - 1] == null ? "M" : "L"}${x(i).toFixed(1)} ${y(tau).toFixed(1)}`;
  });
  svg.append(shape("path", { class: "curve", d: line }));
  $("chart").replaceChildren(svg);
}

function chartLabel() {
  const taus = data.chart.taus.filter((tau) => tau !== null);
  if (!taus.length) return "No trees were verified in the last 10 minutes";
  return `Between ${number(Math.min(...taus), 2)} and ${number(Math.max(...taus), 2)} in the last 10 minutes, ${number(data.total.tau, 2)} since start (dashed)`;
}

function drawTiles() {
  const { minute, load, options: { num_draft_tokens } } = data;
  const tiles = [
    ["Tokens from trees", number(minute.tokens_per_s, minute.tokens_per_s < 10 ? 1 : 0), "/s"],
    ["Target passes", number(minute.passes_per_s, minute.passes_per_s < 10 ? 1 : 0), "/s"],
    ["Nodes per tree", number(minute.nodes_per_tree, 1), `of ${num_draft_tokens}`],
    ["Nodes accepted", minute.verified ? percent(minute.accepted / minute.verified) : "–", ""],
    ["Requests running", number(load && load.running), ""],
    ["Requests waiting", number(load && load.waiting), ""],
    ["KV cache used", load ? percent(load.kv_usage) : "–", ""],
  ];
  $("tiles").replaceChildren(
    ...tiles.map(([name, value, unit]) => make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, ` ${unit}`)))),
  );
}

function row(name, part, value, title) {
  const bar = make("i");
  bar.style.width = `${(100 * Math.min(1, part)).toFixed(1)}%`;
  return make("div", { class: "row", title }, make("span", {}, name), make("span", { class: "bar" }, bar), make("span", {}, value));
}

function fill(id, rows) {
  $(id).replaceChildren(...(rows.length ? rows : [make("p", { class: "note" }, "Nothing in this time.")]));
}

function drawDepths({ depths }) {
  fill("depths", depths.slice(0, MOST_DEPTHS).map(({ reached, accepted }, i) =>
    row(`depth ${i + 1}`, accepted / reached, percent(accepted / reached), `${number(accepted)} of ${number(reached)} walks`)));
}

function drawStages({ stages }) {
  if (!stages.some(({ share }) => share)) return fill("stages", []);
  const parts = stages.map(({ share }, i) => {
    const part = make("i", { class: `s${i}` });
    part.style.width = `${(100 * share).toFixed(2)}%`;
    return part;
  });
  const list = stages.map(({ name, share, ms }, i) =>
    make("li", {}, make("i", { class: `swatch s${i}` }), make("span", {}, name), make("b", {}, percent(share)), make("span", {}, `(${number(ms, 2)} ms)`)));
  $("stages").replaceChildren(make("div", { class: "stack", "aria-hidden": "true" }, ...parts), make("ul", {}, ...list));
}

function drawDecisions({ decisions }) {
  const all = Object.values(decisions).reduce((sum, one) => sum + one, 0);
  const rows = Object.entries(decisions).filter(([name, count]) => count || (all && name === "tree")).map(([name, count]) => {
    const found = row(DECISIONS[name] || name, count / all, percent(count / all), `${number(count)} of ${number(all)}`);
    if (name === "failed") found.classList.add("alarm");
    return found;
  });
  fill("decisions", rows);
}

function drawLoads({ loads }) {
  const most = data.options.num_draft_tokens;
  fill("loads", loads.map(({ requests, nodes, trees }) => row(`${requests} req.`, nodes / most, number(nodes, 1), `${number(trees)} trees`)));
}

// --- trees

function drawTrees() {
  const trees = data.recent.slice(0, MOST_TREES);
  const withText = data.options.show_text;
  say("recent-note", !trees.length ? "No tree was verified yet."
    : `Numbers: how likely the head thinks it that the node is accepted, in percent.${withText ? "" : HIDDEN}`);
  const source = JSON.stringify([trees, $("trees").clientWidth]);
  if (source === drawn) return;
  drawn = source;
  const box = $("trees");
  while (box.children.length > trees.length) box.lastChild.remove();
  while (box.children.length < trees.length) {
    box.append(make("figure", {}, make("figcaption"), make("div", { class: "scroll" })));
  }
  trees.forEach((tree, i) => {
    const [caption, scroll] = box.children[i].children;
    caption.textContent =
      `request ${tree.request} · ${tree.parents.length - 1} nodes · ${tree.path.length} accepted · ${tree.num_emitted} emitted`;
    const svg = drawTree(tree);
    const [wide, high] = [Number(svg.getAttribute("width")), Number(svg.getAttribute("height"))];
    const scale = Math.min(1, Math.max(SMALLEST, scroll.clientWidth / wide));
    svg.setAttribute("width", scale * wide);
    svg.setAttribute("height", scale * high);
    scroll.replaceChildren(svg);
    // What can be scrolled must be reachable by keyboard.
    if (scroll.scrollWidth > scroll.clientWidth) scroll.setAttribute("tabindex", "0");
    else scroll.removeAttribute("tabindex");
  });
}

function visible(text) {
  const plain = text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  return plain.length > 16 ? `${[...plain].slice(0, 15).join("")}…` : plain;
}

// Wide characters take two cells of a monospaced font.
const cells = (text) => [...text].reduce((sum, one) => sum + (one.codePointAt(0) > 0x2e7f ? 2 : 1), 0);

function nodesOf(tree) {
  const nodes = tree.parents.map((parent, i) => ({
    parent,
    children: [],
    kind: i === 0 ? "root" : tree.path.includes(i) ? "on" : "",
    text: tree.texts ? tree.texts[i] : i === 0 ? "root" : "",
    confidence: i === 0 || tree.confidence[i] === null ? "" : number(100 * tree.confidence[i]),
    depth: 0,
  }));
  if (tree.num_emitted > tree.path.length) {
    const parent = tree.path.length ? tree.path[tree.path.length - 1] : 0;
    nodes.push({ parent, children: [], kind: "bonus", text: tree.emitted ? tree.emitted[tree.emitted.length - 1] : "+1", confidence: "", depth: 0 });
  }
  nodes.forEach((node, i) => {
    if (i === 0) return;
    node.depth = nodes[node.parent].depth + 1;
    nodes[node.parent].children.push(i);
  });
  return nodes;
}

function drawTree(tree) {
  const nodes = nodesOf(tree);
  const rowHeight = 27, gap = 18, high = 21;
  let rows = 0;
  (function place(i) {
    // The first child goes on in its parent's row, so the likeliest path is a straight line.
    nodes[i].row = rows;
    nodes[i].children.forEach((child, nth) => {
      if (nth) rows += 1;
      place(child);
    });
  })(0);
  for (const node of nodes) {
    node.label = visible(node.text);
    node.width = 13 + 7.3 * cells(node.label) + (node.label && node.confidence ? 6 : 0) + 6.1 * node.confidence.length;
  }
  const deepest = Math.max(...nodes.map((node) => node.depth));
  const columns = [1];
  for (let depth = 0; depth <= deepest; depth += 1) {
    columns.push(columns[depth] + gap + Math.max(...nodes.filter((node) => node.depth === depth).map((node) => node.width)));
  }
  const width = columns[deepest + 1] - gap + 1, height = (rows + 1) * rowHeight;
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": treeLabel(tree, nodes) });
  const middle = (node) => node.row * rowHeight + rowHeight / 2;
  const late = [];
  for (const node of nodes.slice(1)) {
    const above = nodes[node.parent];
    const [x1, y1, x2, y2] = [columns[above.depth] + above.width, middle(above), columns[node.depth], middle(node)];
    const bend = x2 - gap / 2 + 1;
    const edge = shape("path", { class: `edge ${node.kind}`, d: `M${x1} ${y1}H${bend - 5}C${bend + 1} ${y1} ${bend - 5} ${y2} ${x2} ${y2}` });
    if (node.kind) late.push(edge);
    else svg.append(edge);
  }
  svg.append(...late);
  for (const node of nodes) svg.append(drawNode(node, columns[node.depth], middle(node), high));
  return svg;
}

function drawNode(node, x, y, high) {
  const text = shape("text", { x: x + 6.5, y: y + 4 }, node.label);
  if (node.confidence) text.append(shape("tspan", { class: "small", dx: node.label ? 6 : 0 }, node.confidence));
  const what = { root: "root: the last emitted token", on: "accepted", bonus: "bonus token", "": "not accepted" }[node.kind];
  return shape("g", { class: `node ${node.kind}` },
    shape("title", {}, [node.text, node.confidence, what].filter(Boolean).join("  ")),
    shape("rect", { x, y: y - high / 2, width: node.width, height: high, rx: 6 }), text);
}

function treeLabel(tree, nodes) {
  const path = tree.path.map((i) => `${nodes[i].text} ${nodes[i].confidence}`.trim()).join(", ");
  return `Tree of ${tree.parents.length - 1} nodes, ${tree.path.length} accepted${path ? `: ${path}` : ""}`;
}

poll();
