// TokenLens: the tokens of one completion coloured by a channel and, under them, the duel of the policies at one token.

define("lens", ({ box, data, state }) => {
  const { channels, text } = data, size = text.index.length;
  const legend = make("div"), panel = duelPanel(data), spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const here = () => channels.find((c) => c.key === state.get("channel")) ?? channels[0];
  let rival = data.policies.find((name) => name !== "student");

  const look = (row) => {
    if (row < 0 || row >= size) return;
    panel.show(row, rival, here());
    moveCursor(legend, here(), here().values[row]);
  };
  const speak = (row) => {
    const name = wordOf(text, text.index[row]);
    spoken.textContent = `position ${row}, ${name}, ${here().label} ${measure(here().values[row], here())}${panel.likeliest(row)}`;
  };
  const keys = ({ key }) => {
    const digit = Number(key) - 1;
    if (channels[digit]) state.set("channel", channels[digit].key);
    return Boolean(channels[digit]);
  };
  const recolour = () => {
    rival = here().against || rival;
    buttons.press(channels.indexOf(here()));
    strip.paint(here());
    drawLegend(legend, here());
    look(state.get("selected"));
  };

  const strip = tokenStrip({ text, finish: data.finish, state, keys });
  const buttons = channelButtons(channels, (i) => state.set("channel", channels[i].key));
  const prompt = put(make("div", "opd-prompt", data.prompt), { dir: "auto" }), chrome = make("div", "opd-bar");
  chrome.append(buttons.node, legend);
  box.append(...(data.title ? [make("div", "opd-title", data.title)] : []), prompt, chrome, strip.node, panel.node, spoken);

  if (size && state.get("selected") < 0) state.set("selected", here().peaks[0] ?? 0);
  state.on("channel", recolour);
  state.on("selected", (row) => (look(row), row >= 0 && row < size && speak(row)));
  state.on("hovered", (row) => look(row < 0 ? state.get("selected") : row));
  recolour();
});
