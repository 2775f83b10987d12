// TokenLens: the tokens of one completion coloured by a channel, further channels as tracks, a map of long texts and, under
// them, the duel of the policies at one token, beside up to three that are pinned.

import {
  clamp,
  define,
  drawLegend,
  isNamed,
  make,
  measure,
  moveCursor,
  number,
  put,
  twoSided,
  wordOf,
} from "./core.js";
import { duelPanel } from "./duel.js";
import { LONG_STRIP, miniMap, scrollStrip } from "./minimap.js";
import { channelButtons, tokenStrip } from "./strip.js";
import { helpList, searchField } from "./tools.js";
import { MOST_TRACKS, paintTracks, trackNames } from "./tracks.js";

const PINS = 3;
const KEYS = [
  ["← → ↑ ↓", "go to a token"],
  ["n p", "next, previous peak"],
  ["Home End", "first, last token"],
  ["1 … 9", "choose a channel"],
  ["Shift + click", "on a channel: add a track"],
  ["Shift + ←→", "brush; so does dragging"],
  ["Enter", "pin the token (three at most)"],
  ["/", "find; Enter goes on, Shift back"],
  ["Esc", "let go of brush, then pins"],
  ["?", "this list"],
];

// What all rivals say of a token: the least of their log ratios where all have one sign, else nothing.
const consensusOf = (ratios) => {
  const values = ratios[0].values.map((_, i) => {
    const all = ratios.map((c) => c.values[i]);
    const least = Math.min(...all.map(Math.abs));
    return all.every((v) => v > 0) ? least : all.every((v) => v < 0) ? -least : 0;
  });
  return {
    ...ratios[0],
    key: "",
    label: "all agree",
    values,
    limit: Math.max(...ratios.map((c) => c.limit)),
    peaks: [],
  };
};

// "positions 3 to 9, 7 tokens: log ratio sum −4.1, mean −0.586 nats"; of kinds, how many of each.
const summaryOf = ([from, to = from], channel) => {
  const values = [...channel.values.slice(Math.min(from, to), Math.max(from, to) + 1)];
  const n = values.length;
  const head = `positions ${Math.min(from, to)} to ${Math.max(from, to)}, ${n} tokens: ${channel.label}`;
  if (isNamed(channel))
    return `${head} ${channel.names
      .map((name, k) => [name, values.filter((v) => v === k).length])
      .filter(([, m]) => m)
      .map(([name, m]) => `${name} ${m}`)
      .join(", ")}`;
  const real = values.filter((v) => !Number.isNaN(v));
  const sum = real.reduce((a, b) => a + b, 0);
  const signed = twoSided(channel);
  return `${head} sum ${number(sum, signed)}, mean ${number(sum / real.length, signed)}${channel.unit ? ` ${channel.unit}` : ""}`;
};

const pinCards = (data, state) => {
  const node = put(make("div", "opd-pins"), { role: "group", "aria-label": "Pinned tokens" });
  const cards = [];
  const card = (k) => {
    const holder = make("div", "opd-pin");
    const panel = duelPanel(data);
    const off = put(make("button", "opd-button opd-unpin", `pin ${k + 1} ×`), {
      type: "button",
      "aria-label": `Take away pin ${k + 1}`,
    });
    off.addEventListener("click", () =>
      state.set(
        "pins",
        state.get("pins").filter((_, i) => i !== k),
      ),
    );
    holder.append(off, panel.node);
    node.append(holder);
    return { holder, panel };
  };
  const show = (rows, rival, channel) => {
    node.hidden = !rows.length;
    for (let k = 0; k < Math.max(rows.length, cards.length); k++) {
      cards[k] ??= card(k);
      cards[k].holder.hidden = k >= rows.length;
      if (k < rows.length) cards[k].panel.show(rows[k], rival, channel);
    }
  };
  return { node, show };
};

define("lens", ({ box, data, state }) => {
  const { channels, text } = data;
  const size = text.index.length;
  const ratios = channels.filter((c) => c.kind === "ratio");
  const legend = make("div");
  const panel = duelPanel(data);
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const here = () => channels.find((c) => c.key === state.get("channel")) ?? channels[0];
  const tracks = () =>
    state
      .get("tracks")
      .map((key) => channels.find((c) => c.key === key))
      .filter(Boolean);
  const pins = () =>
    state
      .get("pins")
      .filter((row) => row >= 0 && row < size)
      .slice(0, PINS);
  const consensus = ratios.length > 1 ? [...ratios, consensusOf(ratios)] : [];
  let rival = data.policies.find((name) => name !== "student");
  let found = [];

  const look = (row) => {
    if (row < 0 || row >= size) return;
    panel.show(row, rival, here());
    moveCursor(legend, here(), here().values[row]);
  };
  const speak = (row) => {
    const name = wordOf(text, text.index[row]);
    spoken.textContent = `position ${row}, ${name}, ${here().label} ${measure(here().values[row], here())}${panel.likeliest(row)}`;
  };
  const track = (key) => {
    const held = state.get("tracks");
    state.set(
      "tracks",
      held.includes(key) ? held.filter((k) => k !== key) : [...held, key].slice(-MOST_TRACKS),
    );
  };
  const pin = (row) => {
    const held = pins();
    if (row >= 0)
      state.set(
        "pins",
        held.includes(row) ? held.filter((r) => r !== row) : [...held, row].slice(-PINS),
      );
  };
  const keys = ({ key, shiftKey }) => {
    const digit = Number(key) - 1;
    if (channels[digit]) return (state.set("channel", channels[digit].key), true);
    const act = {
      Enter: () => pin(state.get("selected")),
      "/": () => search.focus(),
      "?": help.toggle,
    }[key];
    return act && !(shiftKey && key === "Enter") ? (act(), true) : false;
  };
  const mapped = () => [...new Set([here(), ...tracks(), ...consensus])];
  const redraw = () =>
    map?.draw(mapped(), { peaks: here().peaks, found, chosen: state.get("selected") });
  const sum = () => {
    const brush = state.get("brush");
    status.textContent = brush.length && rowsIn(brush) ? summaryOf(brush, here()) : "";
  };
  const rowsIn = ([from, to = from]) => from >= 0 && to < size;
  const drawPins = () => {
    strip.node.querySelectorAll("[data-pin]").forEach((old) => old.removeAttribute("data-pin"));
    pins().forEach((row, k) => strip.nodes[row]?.setAttribute("data-pin", k + 1));
    cards.show(pins(), rival, here());
  };
  const retrack = () => {
    paintTracks(strip, tracks());
    names.replaceChildren(
      ...(tracks().length ? [make("span", "opd-soft", "tracks")] : []),
      ...trackNames(tracks(), track),
    );
    buttons.press(channels.indexOf(here()), state.get("tracks"));
    for (const fact of panel.node.querySelectorAll(".opd-fact"))
      fact.toggleAttribute("data-track", state.get("tracks").includes(fact.dataset.channel));
    redraw();
  };
  const recolour = () => {
    rival = here().against || rival;
    buttons.press(channels.indexOf(here()), state.get("tracks"));
    strip.paint(here());
    drawLegend(legend, here());
    look(state.get("selected"));
    drawPins();
    redraw();
    sum();
  };

  const strip = tokenStrip({
    text,
    finish: data.finish,
    state,
    keys,
    escape: () => state.set("pins", []),
  });
  const map = size > LONG_STRIP ? miniMap(strip, data.segments) : null;
  const buttons = channelButtons(
    channels,
    (i) => state.set("channel", channels[i].key),
    (i) => track(channels[i].key),
  );
  const prompt = put(make("div", "opd-prompt", data.prompt), { dir: "auto" });
  const chrome = make("div", "opd-bar");
  const search = searchField(strip, text, state, (rows) => ((found = rows), redraw()));
  const help = helpList(KEYS);
  const tools = make("div", "opd-tools");
  const names = make("div", "opd-track-names");
  const status = put(make("div", "opd-status opd-soft"), { role: "status" });
  const cards = pinCards(data, state);
  if (data.left.length)
    buttons.node.append(
      make(
        "span",
        "opd-choice opd-minor opd-soft",
        `no room in this page: ${data.left.join(", ")}`,
      ),
    );
  chrome.append(buttons.node, legend);
  tools.append(names, status, search.node, help.button);
  strip.node.classList.toggle("opd-tall", Boolean(map));
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    prompt,
    chrome,
    tools,
    help.node,
  );
  box.append(...(map ? [map.node] : []), strip.node, panel.node, cards.node, spoken);

  if (size && state.get("selected") < 0) state.set("selected", here().peaks[0] ?? 0);
  state.on("channel", recolour);
  state.on("tracks", retrack);
  state.on("pins", drawPins);
  state.on("brush", sum);
  state.on("selected", (row) => (look(row), map?.mark(row), row >= 0 && row < size && speak(row)));
  state.on("hovered", (row) => look(row < 0 ? state.get("selected") : row));
  recolour();
  retrack();
  if (map)
    requestAnimationFrame(() => scrollStrip(strip, clamp(state.get("selected"), 0, size - 1))); // once the box has its place
  return () => map?.close();
});
