"use strict";
// The demo model and its tokenizer: text in, experts of every token in every layer out. No DOM.

const BLOCK = 64; // tokens that are computed together

/** Byte-level BPE as in tokenizer.json. `classes` are the letters, numbers and spaces that the
 * tokenizer's own regular expressions know: those of a browser follow another Unicode version. */
class Tokenizer {
  constructor({vocabulary, merges, special, classes}) {
    const {letter, number, space} = classes;
    this.words = new RegExp(
      `'(?:[sS\u017f]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])` +
        `|[^\\r\\n${letter}${number}]?[${letter}]+|[${number}]{1,2}` +
        `| ?[^${space}${letter}${number}]+[\\r\\n]*` +
        `|[${space}]*[\\r\\n]+|[${space}]+(?![^${space}])|[${space}]+`,
      "gu",
    );
    // a byte is written as a character that can be seen (GPT-2's table)
    const seen = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
    let next = 256;
    this.written = Array.from({length: 256}, (_, b) => String.fromCharCode(seen(b) ? b : next++));
    const byteOf = new Map(this.written.map((character, byte) => [character, byte]));
    this.ids = new Map(vocabulary.map((piece, id) => [piece, id]));
    this.ranks = new Map(merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
    this.special = new Map(special);
    const quoted = [...this.special.keys()].map((name) => name.replace(/[^\w]/g, "\\$&"));
    this.specials = new RegExp(`(${quoted.join("|")})`);
    this.bytes = vocabulary.map((piece) =>
      this.special.has(piece)
        ? new TextEncoder().encode(piece)
        : Uint8Array.from(piece, (character) => byteOf.get(character)),
    );
    this.known = new Map();
  }

  /** Return the ids of a text. */
  encode(text) {
    const ids = [];
    for (const part of text.toWellFormed().split(this.specials)) {
      if (this.special.has(part)) ids.push(this.special.get(part));
      else for (const [word] of part.matchAll(this.words)) ids.push(...this.#word(word));
    }
    return ids;
  }

  #word(word) {
    if (this.known.has(word)) return this.known.get(word);
    const pieces = Array.from(new TextEncoder().encode(word), (byte) => this.written[byte]);
    for (;;) {
      let best = Infinity, place = -1;
      for (let i = 0; i + 1 < pieces.length; i++) {
        const rank = this.ranks.get(`${pieces[i]} ${pieces[i + 1]}`);
        if (rank < best) [best, place] = [rank, i];
      }
      if (place < 0) break;
      pieces.splice(place, 2, pieces[place] + pieces[place + 1]);
    }
    const ids = pieces.map((piece) => this.ids.get(piece));
    if (this.known.size > 20_000) this.known.clear();
    this.known.set(word, ids);
    return ids;
  }

  /** Return a token's text; of a token that is a part of a character, its bytes. */
  piece(id) {
    try {
      return new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(this.bytes[id]);
    } catch {
      return `⟨${Array.from(this.bytes[id], (b) => b.toString(16).padStart(2, "0")).join(" ")}⟩`;
    }
  }
}

/** Return the tensors of a safetensors file as {name: [first, elements]}, in a Float32Array. */
function readTensors(file, memory, start) {
  const view = new DataView(file.buffer, file.byteOffset);
  const length = Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + length)));
  delete header.__metadata__;
  const found = {};
  let next = start;
  for (const [name, {dtype, data_offsets: [from, to]}] of Object.entries(header)) {
    if (dtype !== "BF16") throw new Error(`expected weights in BF16, got ${dtype} in ${name}`);
    const source = new Uint16Array(file.slice(8 + length + from, 8 + length + to).buffer);
    // bfloat16 is the upper half of a float32, so that nothing is rounded
    const target = new Uint32Array(memory.buffer, 4 * next, source.length);
    for (let i = 0; i < source.length; i++) target[i] = source[i] << 16;
    found[name] = next;
    next += source.length;
  }
  return [found, next];
}

/** One text under one set of rules: what was computed of it, so that only a changed end is again.
 *
 * `probs` [token][layer][expert], `experts` and `weights` [token][layer][slot], `loss` [token] in
 * nats: how badly the token after this one was foretold. */
class Line {
  constructor(model, place) {
    const {layers, width, experts, topK, context} = model;
    Object.assign(this, {ids: [], rules: "[]", priced: 0, place});
    this.probs = new Float32Array(context * layers * experts);
    this.experts = new Uint8Array(context * layers * topK);
    this.weights = new Float32Array(context * layers * topK);
    this.loss = new Float32Array(context);
    // floats in the model's memory: keys, values (a row a feature, not a token), last hidden states
    this.keys = place;
    this.values = this.keys + layers * context * width;
    this.hidden = this.values + layers * context * width;
  }
  static size({layers, width, context}) {
    return (2 * layers + 1) * context * width;
  }
}

/** OLMoE in float32. Offsets are in floats. */
class Model {
  constructor(config, file, wasm, lines) {
    this.layers = config.num_hidden_layers;
    this.width = config.hidden_size;
    this.inner = config.intermediate_size;
    this.heads = config.num_attention_heads;
    this.experts = config.num_experts;
    this.topK = config.num_experts_per_tok;
    this.vocabulary = config.vocab_size;
    this.context = config.max_position_embeddings;
    this.epsilon = config.rms_norm_eps;
    const {width, inner, context, vocabulary, experts} = this;
    const scratch = {
      x: width, normed: width, q: width, k: width, v: width, scores: context, mixed: width,
      logits: experts, picked: width, gate: inner, up: inner, down: width, words: vocabulary,
    };
    const weights = file.length / 2;
    const sizes = Object.values(scratch).reduce((a, b) => a + b) * BLOCK;
    const floats = 65536 + weights + sizes + lines * Line.size(this);
    const memory = new WebAssembly.Memory({initial: Math.ceil(floats / 16384)});
    this.data = new Float32Array(memory.buffer);
    const instance = new WebAssembly.Instance(new WebAssembly.Module(wasm), {env: {memory}});
    // the compiled code keeps its stack at the beginning
    let [tensors, next] = readTensors(file, memory, 32768);
    this.tensors = tensors;
    this.at = {};
    for (const [name, size] of Object.entries(scratch)) {
      this.at[name] = next;
      next += size * BLOCK;
    }
    this.lines = Array.from({length: lines}, (_, i) => new Line(this, next + i * Line.size(this)));
    this.rows = (x, xs, n, w, ws, outs, ins, y, ys) =>
      instance.exports.rows(4 * x, xs, n, 4 * w, ws, outs, ins, 4 * y, ys);
    const half = width / this.heads / 2;
    const base = config.rope_parameters.rope_theta;
    this.turns = Float32Array.from({length: half}, (_, i) => 1 / Math.fround(base ** (i / half)));
  }

  /** Bring a line up to date with ids and rules; returns the first position that was computed.
   *
   * rules: list of {layer, expert, kind: "force" | "forbid"}, for all tokens. */
  advance(line, ids, rules = []) {
    const key = JSON.stringify(rules);
    let start = 0;
    if (key === line.rules)
      while (start < ids.length && start < line.ids.length && ids[start] === line.ids[start]) start++;
    for (let from = start; from < ids.length; from += BLOCK)
      this.#block(line, ids, from, Math.min(BLOCK, ids.length - from), rules);
    line.ids = ids;
    line.rules = key;
    // the loss of the token before depends on the one that follows it
    line.priced = Math.min(line.priced, Math.max(0, start - 1));
    return start;
  }

  #block(line, ids, from, n, rules) {
    const {width, data, at, tensors, rows} = this;
    const name = (layer, rest) => tensors[`model.layers.${layer}.${rest}.weight`];
    const linear = (x, weight, outs, y, ins = width) => rows(x, ins, n, weight, ins, outs, ins, y, outs);
    for (let t = 0; t < n; t++) {
      const row = tensors["model.embed_tokens.weight"] + ids[from + t] * width;
      data.copyWithin(at.x + t * width, row, row + width);
    }
    for (let layer = 0; layer < this.layers; layer++) {
      this.#norm(at.x, name(layer, "input_layernorm"), n, at.normed);
      for (const part of ["q", "k", "v"])
        linear(at.normed, name(layer, `self_attn.${part}_proj`), width, at[part]);
      for (const part of ["q", "k"]) {
        this.#norm(at[part], name(layer, `self_attn.${part}_norm`), n, at[part]);
        this.#turn(at[part], from, n);
      }
      this.#attend(line, layer, from, n);
      linear(at.mixed, name(layer, "self_attn.o_proj"), width, at.normed);
      this.#add(at.normed, n);
      this.#norm(at.x, name(layer, "post_attention_layernorm"), n, at.normed);
      linear(at.normed, name(layer, "mlp.gate"), this.experts, at.logits);
      this.#route(line, layer, from, n, rules.filter((rule) => rule.layer === layer));
      this.#run(line, layer, from, n, (expert, part) =>
        name(layer, `mlp.experts.${expert}.${part}_proj`));
    }
    this.#norm(at.x, tensors["model.norm.weight"], n, line.hidden + from * width);
  }

  #norm(x, weight, n, out) {
    const {width, data} = this;
    for (let t = 0; t < n; t++) {
      let squares = 0;
      for (let i = 0; i < width; i++) squares += data[x + t * width + i] ** 2;
      const scale = 1 / Math.sqrt(squares / width + this.epsilon);
      for (let i = 0; i < width; i++)
        data[out + t * width + i] = data[x + t * width + i] * scale * data[weight + i];
    }
  }

  #add(from, n) {
    for (let i = 0; i < n * this.width; i++) this.data[this.at.x + i] += this.data[from + i];
  }

  /** Rotate the halves of every head by the position (rotary embedding). */
  #turn(x, from, n) {
    const {width, heads, turns, data} = this;
    const size = width / heads;
    for (let t = 0; t < n; t++)
      for (let i = 0; i < turns.length; i++) {
        const angle = Math.fround((from + t) * turns[i]);
        const cos = Math.cos(angle), sin = Math.sin(angle);
        for (let a = x + t * width + i; a < x + (t + 1) * width; a += size) {
          const first = data[a], second = data[a + size / 2];
          data[a] = first * cos - second * sin;
          data[a + size / 2] = second * cos + first * sin;
        }
      }
  }

  /** Mix the values of earlier tokens, head by head, into `mixed`. */
  #attend(line, layer, from, n) {
    const {width, heads, context, data, at, rows} = this;
    const size = width / heads, last = from + n;
    const keys = line.keys + layer * context * width, values = line.values + layer * context * width;
    data.copyWithin(keys + from * width, at.k, at.k + n * width);
    for (let t = 0; t < n; t++)
      for (let i = 0; i < width; i++) data[values + i * context + from + t] = data[at.v + t * width + i];
    const padded = Math.ceil(last / 4) * 4;
    for (let head = 0; head < heads; head++) {
      rows(at.q + head * size, width, n, keys + head * size, width, last, size, at.scores, context);
      for (let t = 0; t < n; t++) {
        const row = data.subarray(at.scores + t * context, at.scores + t * context + padded);
        softmax(row, from + t + 1, 1 / Math.sqrt(size));
        row.fill(0, from + t + 1);
      }
      const first = values + head * size * context;
      rows(at.scores, context, n, first, context, size, padded, at.mixed + head * size, width);
    }
  }

  /** Choose the experts of each token: the most probable ones, forced ones first. */
  #route(line, layer, from, n, rules) {
    const {experts, topK, layers, data, at} = this;
    const rank = new Int8Array(experts);
    for (const {expert, kind} of rules) rank[expert] = kind === "force" ? 1 : -1;
    for (let t = 0; t < n; t++) {
      const place = ((from + t) * layers + layer) * experts;
      const probs = line.probs.subarray(place, place + experts);
      probs.set(data.subarray(at.logits + t * experts, at.logits + (t + 1) * experts));
      softmax(probs, experts, 1);
      const slots = ((from + t) * layers + layer) * topK;
      const taken = new Uint8Array(experts);
      let sum = 0;
      for (let slot = 0; slot < topK; slot++) {
        let best = -1;
        for (let expert = 0; expert < experts; expert++) {
          if (taken[expert]) continue;
          const ahead = best < 0 || rank[expert] > rank[best] ||
            (rank[expert] === rank[best] && probs[expert] > probs[best]);
          if (ahead) best = expert;
        }
        taken[best] = 1;
        line.experts[slots + slot] = best;
        sum += probs[best];
      }
      for (let slot = 0; slot < topK; slot++)
        line.weights[slots + slot] = probs[line.experts[slots + slot]] / sum;
    }
  }

  /** Add to every token what its experts make of it, weighted. */
  #run(line, layer, from, n, weight) {
    const {experts, topK, layers, width, inner, data, at, rows} = this;
    const shares = Array.from({length: experts}, () => []);
    for (let t = 0; t < n; t++)
      for (let slot = 0; slot < topK; slot++) {
        const place = ((from + t) * layers + layer) * topK + slot;
        shares[line.experts[place]].push([t, line.weights[place]]);
      }
    shares.forEach((share, expert) => {
      const m = share.length;
      if (!m) return;
      share.forEach(([t], i) =>
        data.copyWithin(at.picked + i * width, at.normed + t * width, at.normed + (t + 1) * width));
      rows(at.picked, width, m, weight(expert, "gate"), width, inner, width, at.gate, inner);
      rows(at.picked, width, m, weight(expert, "up"), width, inner, width, at.up, inner);
      for (let i = 0; i < m * inner; i++) {
        const x = data[at.gate + i];
        data[at.gate + i] = (x / (1 + Math.exp(-x))) * data[at.up + i];
      }
      rows(at.gate, inner, m, weight(expert, "down"), inner, width, inner, at.down, width);
      share.forEach(([t, factor], i) => {
        for (let j = 0; j < width; j++)
          data[at.x + t * width + j] += factor * data[at.down + i * width + j];
      });
    });
  }

  #words(line, from, n) {
    const {width, vocabulary, at, tensors} = this;
    const table = tensors["model.embed_tokens.weight"];
    this.rows(line.hidden + from * width, width, n, table, width, vocabulary, width, at.words, vocabulary);
  }

  /** Return the probabilities of all tokens to follow a position. */
  next(line, position) {
    this.#words(line, position, 1);
    const probs = this.data.slice(this.at.words, this.at.words + this.vocabulary);
    softmax(probs, probs.length, 1);
    return probs;
  }

  /** Return the mean loss of a line in nats a token, NaN below two tokens. */
  meanLoss(line) {
    const end = line.ids.length - 1;
    const {vocabulary, at} = this;
    for (let from = line.priced; from < end; from += BLOCK) {
      const n = Math.min(BLOCK, end - from);
      this.#words(line, from, n);
      for (let t = 0; t < n; t++) {
        const row = this.data.subarray(at.words + t * vocabulary, at.words + (t + 1) * vocabulary);
        const target = row[line.ids[from + t + 1]];
        let largest = -Infinity, sum = 0;
        for (const value of row) largest = Math.max(largest, value);
        for (const value of row) sum += Math.exp(value - largest);
        line.loss[from + t] = largest + Math.log(sum) - target;
      }
    }
    line.priced = Math.max(0, end);
    return line.loss.subarray(0, Math.max(0, end)).reduce((a, b) => a + b, 0) / end;
  }

  /** Return the experts of a token in a layer, most probable first. */
  chosen(line, token, layer) {
    const place = (token * this.layers + layer) * this.topK;
    return line.experts.subarray(place, place + this.topK);
  }

  /** Return all experts' probabilities of a token in a layer. */
  probabilities(line, token, layer) {
    const place = (token * this.layers + layer) * this.experts;
    return line.probs.subarray(place, place + this.experts);
  }

  /** Return the probability of the last chosen expert minus that of the best one left out. */
  margin(line, token, layer) {
    const probs = this.probabilities(line, token, layer), chosen = this.chosen(line, token, layer);
    let last = Infinity, left = -Infinity;
    probs.forEach((value, expert) => {
      if (chosen.includes(expert)) last = Math.min(last, value);
      else left = Math.max(left, value);
    });
    return last - left;
  }
}

/** Turn the first n values into probabilities, in place. */
function softmax(values, n, scale) {
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < n; i++) if (values[i] > largest) largest = values[i];
  for (let i = 0; i < n; i++) sum += values[i] = Math.exp((values[i] - largest) * scale);
  for (let i = 0; i < n; i++) values[i] /= sum;
}

/** Return how many tokens two texts share at their beginnings and, of the rest, at their ends. */
function shared(before, after) {
  const most = Math.min(before.length, after.length);
  let head = 0, tail = 0;
  while (head < most && before[head] === after[head]) head++;
  while (tail < most - head && before.at(-1 - tail) === after.at(-1 - tail)) tail++;
  return [head, tail];
}
