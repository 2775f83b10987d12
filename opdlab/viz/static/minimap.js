// The minimap: a long text at a glance. Where many tokens share a pixel the largest size is drawn, never a mean: peaks survive.

import { clamp, css, hueOf, make, put, twoSided, weightOf } from "./core.js";
import { strongest } from "./strip.js";

export const LONG_STRIP = 400; // tokens from which a strip scrolls and has a map
const ROW = 22; // px of a row of the map

const commonest = (values, from, to) => {
  const seen = new Map();
  for (let i = from; i < to; i++)
    if (values[i] >= 0) seen.set(values[i], (seen.get(values[i]) ?? 0) + 1);
  return [...seen].reduce((best, one) => (one[1] > best[1] ? one : best), [-1, 0])[0];
};

// One value a pixel: of numbers the largest size, of kinds the commonest.
const pooled = (channel, first, size, width) =>
  Array.from({ length: width }, (_, x) => {
    const from = first + Math.floor((x * size) / width);
    const to = Math.max(from + 1, first + Math.floor(((x + 1) * size) / width));
    return channel.kind === "category"
      ? commonest(channel.values, from, to)
      : strongest(channel.values, from, to);
  });

const drawMapRow = (canvas, channel, { first, size, peaks, found }) => {
  const density = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * density);
  const high = Math.round(ROW * density);
  if (!width || !size) return;
  [canvas.width, canvas.height] = [width, high];
  const pen = canvas.getContext("2d");
  const signed = twoSided(channel);
  const top = Math.round(4 * density);
  const floor = high - Math.round(2 * density);
  const zero = signed ? (top + floor) / 2 : floor;
  const room = signed ? (floor - top) / 2 : floor - top;
  pooled(channel, first, size, width).forEach((value, x) => {
    const share =
      channel.kind === "category" ? (value + 1) / channel.names.length : weightOf(value, channel);
    if (!(share > 0)) return;
    pen.fillStyle = css(hueOf(value, channel), 0.95);
    const height = Math.max(density, share * room);
    pen.fillRect(x, value < 0 ? zero : zero - height, 1, height);
  });
  pen.fillStyle = getComputedStyle(canvas).color;
  pen.globalAlpha = 0.3;
  pen.fillRect(0, Math.round(zero), width, density);
  pen.globalAlpha = 1;
  for (const row of peaks) {
    const x = ((row - first + 0.5) / size) * width;
    pen.beginPath();
    for (const [dx, y] of [
      [-3, 0],
      [3, 0],
      [0, 4],
    ])
      pen.lineTo(x + dx * density, y * density);
    pen.fill();
  }
  for (const row of found)
    pen.fillRect(
      Math.round(((row - first + 0.5) / size) * width),
      high - 4 * density,
      Math.max(1, density),
      4 * density,
    );
};

// The first and last token of a strip that can be seen in its scrolling box. Only blocks in sight are laid out, so they go first.
const inSight = ({ node, nodes, size }) => {
  const { top, bottom } = node.getBoundingClientRect();
  const blocks = node.querySelectorAll(":scope > .opd-block");
  const search = (low, high, passed) => {
    while (low < high) {
      const middle = (low + high) >> 1;
      if (passed(middle)) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  const at = (y) => {
    let [low, high] = [0, size - 1];
    if (blocks.length) {
      const block =
        blocks[
          Math.min(
            blocks.length - 1,
            search(0, blocks.length, (b) => blocks[b].getBoundingClientRect().bottom > y),
          )
        ];
      const inside = block.querySelectorAll("[data-i]");
      const first = Number(nodes[0].dataset.i);
      [low, high] = [
        Number(inside[0].dataset.i) - first,
        Number(inside[inside.length - 1].dataset.i) - first,
      ];
    }
    return search(low, high, (i) => nodes[i].getBoundingClientRect().bottom > y);
  };
  return [at(top + 4), at(bottom - 8)];
};

// Scrolls the strip, not the page, so that a token lies in the middle; twice, since blocks out of sight only guess their height.
export const scrollStrip = ({ node, nodes }, at) => {
  for (let i = 0; i < 2; i++) {
    const box = node.getBoundingClientRect();
    const token = nodes[at].getBoundingClientRect();
    node.scrollTop += token.top - box.top - box.height / 2;
  }
};

// The bands of [[name, first, size], …]: two shades in turn by name, and the name itself where it fits.
const segmentBands = (segments, size) => {
  const node = make("div", "opd-map-bands");
  const names = [...new Set(segments.map(([name]) => name))];
  for (const [name, first, n] of segments) {
    const band = make("span", names.indexOf(name) % 2 ? "opd-band opd-odd" : "opd-band", name);
    Object.assign(band.style, { left: `${(100 * first) / size}%`, width: `${(100 * n) / size}%` });
    band.title = name;
    node.append(band);
  }
  return node;
};

// { node, draw(rows, { peaks, found, chosen }), close } of a strip: `rows` are channels, one row each, under the bands of `segments`.
export const miniMap = (strip, segments) => {
  const { first, size } = strip;
  const node = make("div", "opd-map");
  const names = make("div", "opd-map-names");
  const rows = make("div", "opd-map-rows");
  const frame = make("div", "opd-frame");
  const here = make("div", "opd-here");
  let drawn = { channels: [], peaks: [], found: [], chosen: -1 };
  put(rows, {
    role: "slider",
    tabindex: "0",
    "aria-label": "Overview: which part of the text is in sight",
    "aria-valuemin": "0",
    "aria-valuemax": String(size - 1),
  });
  node.append(names, rows);

  const follow = () => {
    const [from, to] = inSight(strip);
    const part = (i) => `${(100 * i) / size}%`;
    Object.assign(frame.style, { left: part(from), width: part(Math.max(1, to - from + 1)) });
    const within = segments.filter(([, at, n]) => at <= to && at + n > from).map(([name]) => name);
    put(rows, {
      "aria-valuenow": String(from),
      "aria-valuetext": [`tokens ${from} to ${to} of ${size}`, ...new Set(within)].join(", "),
    });
  };
  const mark = (row) => {
    here.hidden = row < first || row >= first + size;
    here.style.left = `${(100 * (row - first + 0.5)) / size}%`;
  };
  const paint = () => {
    const canvases = rows.querySelectorAll("canvas");
    drawn.channels.forEach((channel, k) =>
      drawMapRow(canvases[k], channel, {
        first,
        size,
        peaks: k ? [] : drawn.peaks,
        found: k ? [] : drawn.found,
      }),
    );
    mark(drawn.chosen);
    follow();
  };
  const draw = (channels, marks) => {
    drawn = { channels, peaks: [], found: [], chosen: -1, ...marks };
    names.replaceChildren(
      ...(segments.length ? [make("div", "opd-map-name opd-map-segment", "segment")] : []),
      ...channels.map((c) => make("div", "opd-map-name", c.label)),
    );
    rows.replaceChildren(
      ...(segments.length ? [segmentBands(segments, size)] : []),
      ...channels.map(() => make("canvas", "opd-map-row")),
      frame,
      here,
    );
    paint();
  };

  const goTo = (event) => {
    const box = rows.getBoundingClientRect();
    scrollStrip(
      strip,
      clamp(Math.floor(((event.clientX - box.left) / box.width) * size), 0, size - 1),
    );
  };
  rows.addEventListener(
    "pointerdown",
    (event) => (rows.setPointerCapture(event.pointerId), goTo(event)),
  );
  rows.addEventListener(
    "pointermove",
    (event) => rows.hasPointerCapture(event.pointerId) && goTo(event),
  );
  rows.addEventListener("keydown", (event) => {
    const page = 0.9 * strip.node.clientHeight;
    const by = {
      ArrowRight: page / 3,
      ArrowLeft: -page / 3,
      PageDown: page,
      PageUp: -page,
      Home: -1e9,
      End: 1e9,
    }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    strip.node.scrollTop += by;
  });
  let waiting = 0;
  strip.node.addEventListener(
    "scroll",
    () => (waiting ||= requestAnimationFrame(() => ((waiting = 0), follow()))),
  );
  const watcher = new ResizeObserver(paint);
  watcher.observe(rows);
  return { node, draw, mark, close: () => watcher.disconnect() };
};
