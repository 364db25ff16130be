"use strict";
// What is seen: the text, its tokens with their experts, and the token that is chosen.

const SAMPLES = {
  "a story": "The old captain looked at the sea, and the sea was calm. He said to his men: the storm will come before the night.",
  "Python": "def area(width, height):\n    if width < 0:\n        raise ValueError('negative')\n    return width * height\n",
  "German": "Klicken Sie auf die Tabelle, um den Bereich zu markieren.",
  "Chinese": "在单元格中输入公式，然后按回车键。",
  "Scripture": "And the LORD said unto Moses, Go unto the people, and sanctify them to day and to morrow.",
};
const CLEAR = 0.25; // margin whose line is as wide as the cell
const SHOWN = 8; // next tokens
const byId = (id) => document.getElementById(id);
const percent = (x) => (x < 0.0005 ? "< 0.1%" : `${(100 * x).toFixed(1)}%`);
const color = (expert) => `oklch(${expert % 2 ? 70 : 85}% ${expert % 2 ? 0.13 : 0.09} ${(expert >> 1) * 45 + 20})`;
const seen = (piece) => piece.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");

let tokenizer, model;
const state = {rules: [], token: -1, follow: true, layer: 0, drawn: [], now: null, before: null, kept: null};

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, act, className) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

async function unpacked(id) {
  const place = byId(id);
  const text = atob(place.textContent);
  place.remove();
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  if (bytes[0] !== 31) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function start() {
  const {config, tokenizer: pieces} = JSON.parse(byId("settings").textContent);
  byId("settings").remove();
  const [wasm, weights] = await Promise.all([unpacked("wasm"), unpacked("weights")]);
  tokenizer = new Tokenizer(pieces);
  // the text under the rules, and as it would be without them
  model = new Model(config, weights, wasm, 2);
  for (const [name, count] of [["layers", model.layers], ["slots", model.topK], ["experts", model.experts]])
    document.querySelector(`span.${name}`).textContent = count;
  byId("size").textContent = (weights.length / 2e6).toFixed(1);
  build();
  byId("text").value = asked.get("text") ?? Object.values(SAMPLES)[0];
  update();
}

/** Make what stays: buttons, and rows that are filled in at every change. */
function build() {
  byId("text").addEventListener("input", update);
  for (const [name, text] of Object.entries(SAMPLES))
    byId("samples").append(button(name, () => write(text)));
  byId("keep").addEventListener("click", () => {
    state.kept = state.kept ? null : state.now;
    state.before = state.kept;
    draw(0);
  });
  for (let layer = 0; layer < model.layers; layer++) {
    const made = button(`L${layer}`, () => choose(state.token, layer));
    made.setAttribute("role", "radio");
    byId("layers").append(made);
  }
  byId("layers").addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    choose(state.token, (state.layer + step + model.layers) % model.layers);
    byId("layers").children[state.layer].focus();
  });
  for (let expert = 0; expert < model.experts; expert++) {
    const row = element("div");
    const name = element("span", "name", `E${expert}`);
    name.style.background = color(expert);
    row.append(name, track(), element("span", "value"));
    for (const kind of ["force", "forbid"]) row.append(button(kind, () => rule(state.layer, expert, kind)));
    byId("experts").append(row);
  }
  for (let i = 0; i < SHOWN; i++) {
    const row = element("li");
    row.append(button("", () => write(byId("text").value + row.piece), "piece"), track(), element("span", "value"));
    byId("next").append(row);
  }
  byId("tokens").addEventListener("click", (event) => {
    const [token, layer] = placeOf(event);
    if (token !== undefined) choose(token, layer ?? state.layer);
  });
  byId("tokens").addEventListener("mouseover", (event) => {
    const [token, layer] = placeOf(event);
    if (layer === undefined) return;
    const probs = model.probabilities(model.lines[0], token, layer);
    const visits = [...model.chosen(model.lines[0], token, layer)].map((e) => `E${e} (${percent(probs[e])})`);
    event.target.title = `layer ${layer}: ${visits.join(", ")}; margin ${model.margin(model.lines[0], token, layer).toFixed(4)}`;
  });
  byId("tokens").addEventListener("keydown", (event) => {
    const last = state.now.ids.length - 1, {token, layer} = state;
    const to = {ArrowRight: [token + 1, layer], ArrowLeft: [token - 1, layer], Home: [0, layer],
      End: [last, layer], ArrowDown: [token, layer + 1], ArrowUp: [token, layer - 1]}[event.key];
    if (!to) return;
    event.preventDefault();
    choose(clamp(to[0], last), clamp(to[1], model.layers - 1));
    byId("tokens").children[state.token].focus();
  });
}

/** Return the token and the layer that an event is about, as far as it is about any. */
function placeOf({target}) {
  const token = target.closest(".token"), cell = target.closest(".cell");
  return [
    token ? [...token.parentNode.children].indexOf(token) : undefined,
    cell ? [...token.children].indexOf(cell) - 1 : undefined,
  ];
}

const clamp = (value, most) => Math.max(0, Math.min(value, most));

function track() {
  const made = element("span", "track");
  made.append(element("i"), element("b"));
  return made;
}

function fill(row, value, mark, text) {
  const [bar, tick] = row.querySelector(".track").children;
  bar.style.width = `${100 * value}%`;
  tick.hidden = mark === null;
  tick.style.left = `${100 * mark}%`;
  row.querySelector(".value").textContent = text;
}

function write(text) {
  byId("text").value = text;
  update();
}

/** Route the text as it is now, and draw what changed. */
function update() {
  const begun = performance.now();
  const all = tokenizer.encode(byId("text").value);
  const ids = all.slice(0, model.context);
  const [line, free] = model.lines;
  const first = model.advance(line, ids, state.rules);
  if (state.rules.length) model.advance(free, ids);
  state.before = state.kept ?? state.now;
  state.now = {ids, cut: all.length - ids.length,
    experts: line.experts.slice(0, ids.length * model.layers * model.topK)};
  if (state.follow || state.token >= ids.length) state.token = ids.length - 1;
  const routed = performance.now();
  draw(first);
  const drawn = performance.now();
  byId("speed").textContent =
    `the last change took ${(routed - begun).toFixed(0)} ms for ${ids.length - first} tokens, and ` +
    `${(drawn - routed).toFixed(0)} ms to draw.`;
}

/** Return a set of experts of a moment as text that does not depend on their order. */
function choiceOf(moment, token, layer) {
  const place = (token * model.layers + layer) * model.topK;
  return [...moment.experts.subarray(place, place + model.topK)].sort((a, b) => a - b).join(" ");
}

/** Return which tokens are new, and [token, layers] of those that went elsewhere than before. */
function changes() {
  const {now, before} = state;
  if (!before) return {fresh: new Set(), flips: new Map(), head: now.ids.length, tail: 0};
  const [head, tail] = shared(before.ids, now.ids);
  const length = now.ids.length, shift = before.ids.length - length;
  const fresh = new Set(Array.from({length: length - head - tail}, (_, i) => head + i));
  const flips = new Map();
  for (let token = 0; token < length; token++) {
    if (fresh.has(token)) continue;
    const old = token < head ? token : token + shift;
    const layers = [];
    for (let layer = 0; layer < model.layers; layer++)
      if (choiceOf(now, token, layer) !== choiceOf(before, old, layer)) layers.push(layer);
    if (layers.length) flips.set(token, layers);
  }
  return {fresh, flips, head, tail};
}

/** Draw the tokens, those before `first` with their marks only, and everything else. */
function draw(first) {
  const place = byId("tokens"), {ids} = state.now;
  const change = changes();
  // tokens that stay keep their place on the page, so that little is drawn again
  const [head, tail] = shared(state.drawn, ids);
  for (let gone = state.drawn.length - head - tail; gone > 0; gone--) place.children[head].remove();
  const after = place.children[head] ?? null;
  for (let made = ids.length - head - tail; made > 0; made--) place.insertBefore(blank(), after);
  state.drawn = ids;
  [...place.children].forEach((made, token) => drawToken(made, token, token >= first, change));
  byId("change").textContent = said(change);
  byId("keep").setAttribute("aria-pressed", String(!!state.kept));
  byId("kept").textContent = state.kept
    ? `Compared with: ${state.kept.ids.map((id) => tokenizer.piece(id)).join("").slice(0, 120)}` : "";
  drawChosen();
}

function blank() {
  const made = element("button", "token");
  made.type = "button";
  made.append(element("span", "piece"));
  for (let layer = 0; layer < model.layers; layer++) made.append(element("span", "cell"));
  return made;
}

function drawToken(made, token, computed, {fresh, flips}) {
  const line = model.lines[0];
  if (computed) {
    const piece = seen(tokenizer.piece(line.ids[token]));
    if (made.children[0].textContent !== piece) made.children[0].textContent = piece;
    made.setAttribute("aria-label", `token ${token}, ${piece}`);
    for (let layer = 0; layer < model.layers; layer++) {
      const cell = made.children[layer + 1], chosen = model.chosen(line, token, layer);
      const clear = Math.round(100 * clamp(model.margin(line, token, layer) / CLEAR, 1));
      const shown = `${chosen.join(" ")}, ${clear}`;
      if (cell.shown === shown) continue;
      cell.shown = shown;
      cell.textContent = chosen.join(" ");
      cell.style.setProperty("--first", color(chosen[0]));
      cell.style.setProperty("--second", color(chosen[chosen.length - 1]));
      cell.style.setProperty("--clear", `${clear}%`);
    }
  }
  made.classList.toggle("new", fresh.has(token));
  const flipped = flips.get(token) ?? [];
  for (let layer = 0; layer < model.layers; layer++) {
    made.children[layer + 1].classList.toggle("flipped", flipped.includes(layer));
    made.children[layer + 1].classList.toggle("here", layer === state.layer);
  }
  made.setAttribute("aria-pressed", String(token === state.token));
  made.tabIndex = token === state.token ? 0 : -1;
}

/** Say what the last change did. */
function said({fresh, flips, head, tail}) {
  const {ids, cut} = state.now;
  if (!ids.length) return "Type something: every token finds its experts at once.";
  const sentences = [];
  if (cut) sentences.push(`The model reads ${model.context} tokens; ${cut} more are left out.`);
  if (!state.before && byId("text").value === Object.values(SAMPLES)[0])
    sentences.push("Try it: change “calm” to “angry”, and see which of the later tokens take other experts.");
  else if (!state.before || (!fresh.size && !flips.size)) sentences.push(closest());
  else {
    if (fresh.size) sentences.push(`${count(fresh.size, "token")} new or changed (underlined).`);
    if (flips.size) {
      const named = [...flips].slice(0, 4).map(([token, layers]) =>
        `“${seen(tokenizer.piece(ids[token]))}” in ${layers.map((l) => `L${l}`).join(", ")}`);
      const more = flips.size > 4 ? ` and ${flips.size - 4} more` : "";
      sentences.push(`${count(flips.size, "token")} that stayed went to other experts (ringed): ${named.join("; ")}${more}.`);
    } else if (tail) sentences.push(`The ${count(tail, "token")} behind kept their experts.`);
    else if (head) sentences.push("Tokens before a change keep their experts: the model reads forwards only.");
  }
  return sentences.join(" ");
}

const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** Say which choice of the whole text was the closest. */
function closest() {
  const line = model.lines[0];
  let [least, token, layer] = [Infinity, 0, 0];
  for (let t = 0; t < line.ids.length; t++)
    for (let l = 0; l < model.layers; l++) {
      const margin = Math.abs(model.margin(line, t, l));
      if (margin < least) [least, token, layer] = [margin, t, l];
    }
  return `${count(line.ids.length, "token")}. The closest call: “${seen(tokenizer.piece(line.ids[token]))}” in layer ${layer}, by ${least.toPrecision(1)}.`;
}

function choose(token, layer) {
  const place = byId("tokens");
  state.follow = token === state.now.ids.length - 1;
  const change = changes();
  const old = state.token;
  const all = layer !== state.layer;
  Object.assign(state, {token, layer});
  for (let t = 0; t < place.children.length; t++)
    if (all || t === old || t === token) drawToken(place.children[t], t, false, change);
  drawChosen();
}

function drawChosen() {
  const {token, layer} = state, [line, free] = model.lines;
  const none = token < 0, last = token === line.ids.length - 1;
  document.querySelector("aside").hidden = none;
  if (none) return;
  byId("chosen").textContent = `Token ${token}: “${seen(tokenizer.piece(line.ids[token]))}”`;
  const probs = model.next(line, token);
  const other = state.rules.length ? model.next(free, token) : null;
  const best = largest(probs, SHOWN);
  byId("goes-on").textContent = last
    ? "After the last token. Click one to write it."
    : `After this token. The text goes on with “${seen(tokenizer.piece(line.ids[token + 1]))}” (${percent(probs[line.ids[token + 1]])}).`;
  best.forEach((id, i) => {
    const row = byId("next").children[i];
    row.piece = tokenizer.piece(id);
    row.firstChild.textContent = seen(row.piece);
    row.firstChild.disabled = !last || /^⟨.*⟩$/.test(row.piece);
    fill(row, probs[id], other && other[id], percent(probs[id]));
  });
  [...byId("layers").children].forEach((made, l) => {
    made.setAttribute("aria-checked", String(l === layer));
    made.tabIndex = l === layer ? 0 : -1;
  });
  const seenHere = model.probabilities(line, token, layer), chosen = model.chosen(line, token, layer);
  const left = largest(seenHere, model.experts).find((expert) => !chosen.includes(expert));
  byId("choice").textContent =
    `In layer ${layer} it visits ${[...chosen].map((e) => `E${e} (${percent(seenHere[e])})`).join(" and ")}. ` +
    `The best one left out is E${left} (${percent(seenHere[left])}): margin ${model.margin(line, token, layer).toFixed(4)}.`;
  const here = state.rules.filter((rule) => rule.layer === layer);
  const of = (expert, kind) => here.some((rule) => rule.expert === expert && rule.kind === kind);
  const full = {
    force: here.filter((rule) => rule.kind === "force").length >= model.topK,
    forbid: here.filter((rule) => rule.kind === "forbid").length >= model.experts - model.topK,
  };
  [...byId("experts").children].forEach((row, expert) => {
    row.classList.toggle("taken", chosen.includes(expert));
    fill(row, seenHere[expert], null, percent(seenHere[expert]));
    ["force", "forbid"].forEach((kind, i) => {
      const made = row.children[3 + i];
      made.setAttribute("aria-pressed", String(of(expert, kind)));
      made.setAttribute("aria-label", `${kind} expert ${expert} in layer ${layer}`);
      made.disabled = full[kind] && !of(expert, kind);
    });
  });
  drawRules();
}

function largest(values, n) {
  const found = [];
  values.forEach((value, id) => {
    if (found.length === n && value <= values[found[n - 1]]) return;
    let place = found.length;
    while (place && values[found[place - 1]] < value) place--;
    found.splice(place, 0, id);
    found.length = Math.min(found.length, n);
  });
  return found;
}

/** Force or forbid an expert for all tokens, or take that back. */
function rule(layer, expert, kind) {
  const others = state.rules.filter((r) => r.layer !== layer || r.expert !== expert);
  const had = state.rules.some((r) => r.layer === layer && r.expert === expert && r.kind === kind);
  state.rules = had ? others : [...others, {layer, expert, kind}];
  update();
}

function drawRules() {
  const place = byId("rules"), [line, free] = model.lines;
  place.replaceChildren(...state.rules.map(({layer, expert, kind}) =>
    button(`${kind === "force" ? "forced" : "forbidden"}: L${layer}.E${expert} ×`, () => rule(layer, expert, kind))));
  byId("what-if").hidden = !state.rules.length;
  if (!state.rules.length) return;
  let moved = 0;
  const n = line.ids.length;
  const other = {experts: free.experts}, own = {experts: line.experts};
  for (let token = 0; token < n; token++)
    for (let layer = 0; layer < model.layers; layer++)
      moved += choiceOf(own, token, layer) !== choiceOf(other, token, layer);
  const [ruled, plain] = [model.meanLoss(line), model.meanLoss(free)];
  byId("effect").textContent =
    `${moved} of ${n * model.layers} choices differ from those without the rules.` +
    (n > 1 ? ` The text is foretold ${ruled > plain ? "worse" : "better"}: ${ruled.toFixed(3)} nats a token instead of ${plain.toFixed(3)} (${ruled > plain ? "+" : "−"}${Math.abs(ruled - plain).toFixed(3)}).` : "") +
    " The marks in the bars of what comes next are without them.";
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
}

const asked = new URLSearchParams(location.hash.slice(1));
document.documentElement.classList.toggle("embedded", asked.has("embedded"));
theme(asked.has("theme") ? asked.get("theme") === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
byId("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme !== "dark"));
start().catch((error) => {
  byId("problem").hidden = false;
  byId("problem").textContent = `The model could not be started in this browser: ${error.message}. It needs WebAssembly with SIMD and DecompressionStream (browsers since 2023).`;
});
