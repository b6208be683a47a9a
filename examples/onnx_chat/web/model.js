// A model that `mc-transformers export` has written, in a browser: the same as onnx_model.py, on onnxruntime-web.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that isolate the page

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  return answer;
}

/** One token per byte, as in checkpoints whose tokenizer.json has no merges. */
class ByteTokenizer {
  constructor(file) {
    if (file.model.type !== "BPE" || file.model.merges.length) {
      throw new Error("this page knows tokenizers of bytes only");
    }
    // ByteLevel names a byte by a character: itself where it can be seen, else one from 256 on
    const seen = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    this.ids = [];
    this.bytes = new Map();
    for (let byte = 0, next = 256; byte < 256; byte++) {
      this.ids[byte] = file.model.vocab[String.fromCharCode(seen(byte) ? byte : next++)];
      this.bytes.set(this.ids[byte], byte);
    }
  }

  encode(text) {
    return Array.from(new TextEncoder().encode(text), (byte) => this.ids[byte]);
  }

  decode(tokens) {
    return new TextDecoder().decode(Uint8Array.from(tokens.filter((t) => this.bytes.has(t)), (t) => this.bytes.get(t)));
  }
}

export class Model {
  /** Both graphs of an exported folder at `url`, which ends with a slash. */
  static async load(url) {
    const model = new Model();
    model.about = await (await fetched(url + "export.json")).json();
    model.start = await (await fetched(url + "start.bin")).arrayBuffer();
    model.tokenizer = new ByteTokenizer(await (await fetched(url + "tokenizer.json")).json());
    const weights = new Uint8Array(await (await fetched(url + "weights.data")).arrayBuffer());
    const options = { executionProviders: ["wasm"], externalData: [{ path: "weights.data", data: weights }] };
    model.sessions = {};
    for (const [name, file] of Object.entries(model.about.files)) {
      const graph = new Uint8Array(await (await fetched(url + file)).arrayBuffer());
      model.sessions[name] = await ort.InferenceSession.create(graph, options);
    }
    return model;
  }

  /** The memory before the first token. */
  empty() {
    const states = {};
    for (const { name, shape, dtype, start } of this.about.states) {
      const size = shape.reduce((a, b) => a * b, 1);
      const data = start === undefined ? new ARRAYS[dtype](size) : new ARRAYS[dtype](this.start.slice(start), 0, size);
      states[name] = new ort.Tensor(dtype, data, shape);
    }
    return { states, seen: 0 };
  }

  /** Reads tokens into a memory; what the last one was answered: `logits`, and `reads` if the export has them. */
  async read(memory, ids) {
    const { piece, max_length: room } = this.about;
    if (!ids.length) throw new Error("nothing to read");
    if (room !== null && memory.seen + ids.length > room) {
      throw new Error(`${memory.seen + ids.length} tokens would be read, and the cache has room for ${room}`);
    }
    let out;
    for (let start = 0; start < ids.length; start += piece) {
      const part = ids.slice(start, start + piece).map(BigInt);
      const one = part.length === 1;
      const padded = new BigInt64Array(one ? 1 : piece);
      padded.set(part);
      const inputs = { input_ids: new ort.Tensor("int64", padded, [1, padded.length]) };
      if (!one) inputs.length = new ort.Tensor("int64", [BigInt(part.length)], [1]);
      out = await this.run(one ? "decode" : "prefill", memory, inputs);
      memory.seen += part.length;
    }
    return { logits: out.logits.data, reads: out.reads };
  }

  async run(name, memory, inputs) {
    const session = this.sessions[name];
    const given = { ...memory.states, ...inputs };
    const out = await session.run(Object.fromEntries(session.inputNames.map((key) => [key, given[key]])));
    const slot = out.slot === undefined ? -1 : Number(out.slot.data[0]);
    for (const [key, state] of Object.entries(memory.states)) {
      if (`next_${key}` in out) {
        memory.states[key] = out[`next_${key}`];
      } else if (slot >= 0) { // a segment has ended
        const finished = out[`finished_${key}`].data;
        state.data.set(finished, slot * finished.length);
      }
    }
    return out;
  }

  /** Reads a text, then yields the likeliest tokens one by one: `{token, reads}`, what the token before it read. */
  async *generate(memory, text, count) {
    let ids = this.tokenizer.encode(text);
    for (let i = 0; i < count; i++) {
      const { logits, reads } = await this.read(memory, ids);
      const token = logits.reduce((best, x, at) => (x > logits[best] ? at : best), 0);
      if (this.about.eos_token_ids.includes(token)) return;
      yield { token, reads };
      ids = [token];
    }
  }

  /** Gates `[segments + 1]` averaged over layers and heads, the running memory in the last place. */
  static mean(reads) {
    const [layers, heads, columns] = reads.dims;
    const found = new Array(columns).fill(0);
    reads.data.forEach((gate, at) => (found[at % columns] += gate / (layers * heads)));
    return found;
  }
}
