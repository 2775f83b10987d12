// Reads the block that `payload.pack` wrote. The deflate decoder is our own 60 lines: it needs no await and no newer browser.

export const bytesOf = (base64) => {
  const text = atob(base64);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
};

// RFC 1951. A code table is [counts by length, symbols by code].
const codeTable = (lengths) => {
  const counts = new Uint16Array(16);
  const offsets = new Uint16Array(16);
  const symbols = new Uint16Array(lengths.length);
  for (const length of lengths) counts[length]++;
  counts[0] = 0;
  for (let i = 1; i < 15; i++) offsets[i + 1] = offsets[i] + counts[i];
  lengths.forEach((length, symbol) => length && (symbols[offsets[length]++] = symbol));
  return [counts, symbols];
};

const LENGTH_ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
const ladder = (start, extra) => extra.map((bits) => [(start += 1 << bits) - (1 << bits), bits]);
const LENGTHS = [
  ...ladder(
    3,
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5],
  ),
  [258, 0],
];
const DISTANCES = ladder(1, [0, 0, 0, 0, ...Array.from({ length: 26 }, (_, i) => 1 + (i >> 1))]);
const FIXED = [
  codeTable(Array.from({ length: 288 }, (_, i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8))),
  codeTable(new Array(30).fill(5)),
];

const inflate = (input) => {
  let at = 0;
  let held = 0;
  let count = 0;
  let size = 0;
  let out = new Uint8Array(input.length * 4 + 1024);
  const bits = (n) => {
    while (count < n) {
      if (at >= input.length)
        throw new Error("The data of this view is cut short. Make the view again.");
      held |= input[at++] << count;
      count += 8;
    }
    const value = held & ((1 << n) - 1);
    held >>>= n;
    count -= n;
    return value;
  };
  const symbol = ([counts, symbols]) => {
    for (let length = 1, code = 0, first = 0, index = 0; length < 16; length++) {
      code |= bits(1);
      if (code - counts[length] < first) return symbols[index + code - first];
      index += counts[length];
      first = (first + counts[length]) << 1;
      code <<= 1;
    }
    throw new Error("The data of this view is damaged. Make the view again.");
  };
  const room = (n) => {
    if (size + n <= out.length) return;
    const larger = new Uint8Array(2 * (size + n));
    larger.set(out);
    out = larger;
  };
  const stored = () => {
    held = count = 0;
    const length = input[at] | (input[at + 1] << 8);
    room(length);
    out.set(input.subarray(at + 4, at + 4 + length), size);
    [at, size] = [at + 4 + length, size + length];
  };
  const tables = () => {
    const literals = bits(5) + 257;
    const distances = bits(5) + 1;
    const codes = new Array(19).fill(0);
    const lengths = [];
    for (let i = 0, n = bits(4) + 4; i < n; i++) codes[LENGTH_ORDER[i]] = bits(3);
    const table = codeTable(codes);
    while (lengths.length < literals + distances) {
      const s = symbol(table);
      const last = lengths.at(-1);
      if (s < 16) lengths.push(s);
      else
        for (let n = s === 16 ? 3 + bits(2) : s === 17 ? 3 + bits(3) : 11 + bits(7); n--;)
          lengths.push(s === 16 ? last : 0);
    }
    return [codeTable(lengths.slice(0, literals)), codeTable(lengths.slice(literals))];
  };
  for (let final = 0; !final;) {
    final = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      stored();
      continue;
    }
    const [literal, distance] = kind === 1 ? FIXED : tables();
    for (let s = symbol(literal); s !== 256; s = symbol(literal)) {
      room(258);
      if (s < 256) {
        out[size++] = s;
        continue;
      }
      const [base, extra] = LENGTHS[s - 257];
      const length = base + bits(extra);
      const [far, more] = DISTANCES[symbol(distance)];
      for (let from = size - far - bits(more), end = size + length; size < end;)
        out[size++] = out[from++];
    }
  }
  return out.subarray(0, size);
};

// Half precision to single: the exponent and mantissa bits moved into place.
const halves = (raw) => {
  const out = new Float32Array(raw.length);
  for (let i = 0; i < raw.length; i++) {
    const h = raw[i];
    const sign = h & 0x8000 ? -1 : 1;
    const exponent = (h >> 10) & 31;
    const mantissa = h & 1023;
    if (exponent === 31) out[i] = mantissa ? NaN : sign * Infinity;
    else
      out[i] = sign * (exponent ? 2 ** (exponent - 25) * (1024 + mantissa) : 2 ** -24 * mantissa);
  }
  return out;
};

const levels = (raw, top) =>
  Float32Array.from(raw, (q) =>
    q === -128 ? NaN : Math.abs(q) > 126 ? q * Infinity : Math.sign(q) * (q / 126) ** 2 * top,
  );

const KINDS = {
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

// The tree with its arrays, as typed arrays, in place.
export const decode = (packed) => {
  const raw = inflate(packed);
  const buffer = raw.buffer;
  const size = new DataView(buffer).getUint32(0, true);
  const { tree, arrays } = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + size)));
  const base = Math.ceil((4 + size) / 8) * 8;
  for (const [path, kind, start, length, top] of arrays) {
    const array = new KINDS[kind](buffer, base + start, length);
    const last = path.pop();
    path.reduce((node, step) => node[step], tree)[last] =
      kind === "f2" ? halves(array) : kind === "levels" ? levels(array, top) : array;
  }
  return tree;
};
