// Reads the block that `payload.pack` wrote. The deflate decoder is our own: it needs no await and no newer browser.

/** @param {string} base64 */
export const bytesOf = (base64) => {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
};

// ── Deflate, RFC 1951 ────────────────────────────────────────────────────────────────────────────

/**
 * A Huffman code: how many symbols have each length, and the symbols in the order of their codes.
 * @typedef {[counts: Uint16Array, symbols: Uint16Array]} CodeTable
 *
 * Where the decoder stands: `held` has `count` bits that were read but not used; `size` bytes of `output` are written.
 * @typedef {object} Inflater
 * @property {Uint8Array} input
 * @property {number} at
 * @property {number} held
 * @property {number} count
 * @property {Uint8Array} output
 * @property {number} size
 */

const MAX_CODE_LENGTH = 15;
const END_OF_BLOCK = 256;
const LONGEST_MATCH = 258;

/**
 * @param {number[]} lengths of each symbol's code, 0 for unused symbols
 * @returns {CodeTable}
 */
const codeTable = (lengths) => {
  const counts = new Uint16Array(MAX_CODE_LENGTH + 1);
  const offsets = new Uint16Array(MAX_CODE_LENGTH + 1);
  const symbols = new Uint16Array(lengths.length);
  for (const length of lengths) counts[length]++;
  counts[0] = 0;
  for (let i = 1; i < MAX_CODE_LENGTH; i++) offsets[i + 1] = offsets[i] + counts[i];
  lengths.forEach((length, symbol) => {
    if (length) symbols[offsets[length]++] = symbol;
  });
  return [counts, symbols];
};

// [smallest value, extra bits] of each length and distance symbol: ranges follow one another.
/** @param {number} start @param {number[]} extraBits @returns {[number, number][]} */
const rangesOf = (start, extraBits) => {
  let next = start;
  return extraBits.map((bits) => {
    next += 1 << bits;
    return [next - (1 << bits), bits];
  });
};

/** @type {[number, number][]} */
const LENGTHS = [
  ...rangesOf(
    3,
    Array.from({ length: 28 }, (_, i) => Math.max(0, (i >> 2) - 1)),
  ),
  [LONGEST_MATCH, 0],
];
const DISTANCES = rangesOf(
  1,
  Array.from({ length: 30 }, (_, i) => Math.max(0, (i >> 1) - 1)),
);
const LENGTH_ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
const FIXED = [
  codeTable([
    ...new Array(144).fill(8),
    ...new Array(112).fill(9),
    ...new Array(24).fill(7),
    ...new Array(8).fill(8),
  ]),
  codeTable(new Array(30).fill(5)),
];

/** @param {Inflater} reader @param {number} count */
const readBits = (reader, count) => {
  while (reader.count < count) {
    if (reader.at >= reader.input.length) {
      throw new Error("The data of this view is cut short. Make the view again.");
    }
    reader.held |= reader.input[reader.at++] << reader.count;
    reader.count += 8;
  }
  const value = reader.held & ((1 << count) - 1);
  reader.held >>>= count;
  reader.count -= count;
  return value;
};

/** @param {Inflater} reader @param {CodeTable} table */
const readSymbol = (reader, [counts, symbols]) => {
  let code = 0;
  let first = 0; // code of the first symbol of this length
  let index = 0; // its place among the symbols
  for (let length = 1; length <= MAX_CODE_LENGTH; length++) {
    code |= readBits(reader, 1);
    if (code - counts[length] < first) return symbols[index + code - first];
    index += counts[length];
    first = (first + counts[length]) << 1;
    code <<= 1;
  }
  throw new Error("The data of this view is damaged. Make the view again.");
};

/** @param {Inflater} reader @param {number} bytes */
const makeRoom = (reader, bytes) => {
  if (reader.size + bytes <= reader.output.length) return;
  const larger = new Uint8Array(2 * (reader.size + bytes));
  larger.set(reader.output);
  reader.output = larger;
};

/** @param {Inflater} reader */
const copyStored = (reader) => {
  reader.held = 0;
  reader.count = 0;
  const { input, at } = reader;
  const length = input[at] | (input[at + 1] << 8);
  makeRoom(reader, length);
  reader.output.set(input.subarray(at + 4, at + 4 + length), reader.size); // 4 bytes: length and its complement
  reader.at += 4 + length;
  reader.size += length;
};

/** How often symbols 16, 17 and 18 repeat. @param {Inflater} reader @param {number} symbol */
const readRepeats = (reader, symbol) => {
  if (symbol === 16) return 3 + readBits(reader, 2);
  return symbol === 17 ? 3 + readBits(reader, 3) : 11 + readBits(reader, 7);
};

/** @param {Inflater} reader */
const readTables = (reader) => {
  const literals = readBits(reader, 5) + 257;
  const distances = readBits(reader, 5) + 1;
  const used = readBits(reader, 4) + 4;
  const codeLengths = new Array(19).fill(0);
  for (let i = 0; i < used; i++) codeLengths[LENGTH_ORDER[i]] = readBits(reader, 3);
  const table = codeTable(codeLengths);
  /** @type {number[]} */
  const lengths = [];
  while (lengths.length < literals + distances) {
    const symbol = readSymbol(reader, table);
    if (symbol < 16) {
      lengths.push(symbol);
      continue;
    }
    const repeated = symbol === 16 ? (lengths.at(-1) ?? 0) : 0;
    for (let left = readRepeats(reader, symbol); left > 0; left--) lengths.push(repeated);
  }
  return [codeTable(lengths.slice(0, literals)), codeTable(lengths.slice(literals))];
};

/** @param {Inflater} reader @param {CodeTable} literals @param {CodeTable} distances */
const inflateBlock = (reader, literals, distances) => {
  for (;;) {
    const symbol = readSymbol(reader, literals);
    if (symbol === END_OF_BLOCK) return;
    makeRoom(reader, LONGEST_MATCH);
    if (symbol < END_OF_BLOCK) {
      reader.output[reader.size++] = symbol;
      continue;
    }
    const [base, extra] = LENGTHS[symbol - 257];
    const end = reader.size + base + readBits(reader, extra);
    const [far, more] = DISTANCES[readSymbol(reader, distances)];
    // Byte by byte, since a match may overlap what it writes.
    let from = reader.size - far - readBits(reader, more);
    while (reader.size < end) reader.output[reader.size++] = reader.output[from++];
  }
};

/** @param {Uint8Array} input */
export const inflate = (input) => {
  const output = new Uint8Array(input.length * 4 + 1024);
  const reader = { input, at: 0, held: 0, count: 0, output, size: 0 };
  let isLast = false;
  while (!isLast) {
    isLast = readBits(reader, 1) === 1;
    const kind = readBits(reader, 2);
    if (kind === 0) {
      copyStored(reader);
    } else {
      const [literals, distances] = kind === 1 ? FIXED : readTables(reader);
      inflateBlock(reader, literals, distances);
    }
  }
  return reader.output.subarray(0, reader.size);
};

// ── Arrays ───────────────────────────────────────────────────────────────────────────────────────

// Half precision to single: the bits of exponent and mantissa read apart.
/** @param {Uint16Array} raw */
const floatsOfHalves = (raw) =>
  Float32Array.from(raw, (half) => {
    const sign = half & 0x8000 ? -1 : 1;
    const exponent = (half >> 10) & 31;
    const mantissa = half & 1023;
    if (exponent === 31) return mantissa ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 25) * (1024 + mantissa) : 2 ** -24 * mantissa);
  });

// 8 bits a number, with squares as levels, so that what the colour shows (square roots) has even steps.
/** @param {Int8Array} raw @param {number} top */
const floatsOfLevels = (raw, top) =>
  Float32Array.from(raw, (level) => {
    if (level === -128) return NaN;
    if (Math.abs(level) > 126) return level * Infinity;
    return Math.sign(level) * (level / 126) ** 2 * top;
  });

/** @type {Record<string, new (buffer: ArrayBufferLike, start: number, length: number) => any>} */
const ARRAYS = {
  u1: Uint8Array,
  i1: Int8Array,
  u2: Uint16Array,
  i2: Int16Array,
  u4: Uint32Array,
  i4: Int32Array,
  f2: Uint16Array,
  f4: Float32Array,
  f8: Float64Array,
  levels: Int8Array,
};

/** @param {ArrayBufferLike} buffer @param {string} kind @param {number} start @param {number} length @param {number} top */
const readArray = (buffer, kind, start, length, top) => {
  const array = new ARRAYS[kind](buffer, start, length);
  if (kind === "f2") return floatsOfHalves(array);
  return kind === "levels" ? floatsOfLevels(array, top) : array;
};

/**
 * Return the payload: the tree of the block with its arrays as typed arrays.
 * @param {Uint8Array} packed
 */
export const decode = (packed) => {
  const raw = inflate(packed);
  const { buffer } = raw;
  const size = new DataView(buffer).getUint32(0, true);
  const { tree, arrays } = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + size)));
  const base = Math.ceil((4 + size) / 8) * 8;
  for (const [path, kind, start, length, top] of arrays) {
    const last = path.pop();
    const parent = path.reduce(
      (/** @type {any} */ node, /** @type {string} */ step) => node[step],
      tree,
    );
    parent[last] = readArray(buffer, kind, base + start, length, top);
  }
  return tree;
};
