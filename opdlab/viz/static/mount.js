// Mounts views: as a widget (the default export), and every HTML output on the page whose view this module knows.

import { make, views } from "./core.js";
import { bytesOf, decode } from "./payload.js";
import { connect, fakeModel } from "./state.js";

const packedOf = (model) => {
  const packed = model.get("packed");
  return typeof packed === "string"
    ? bytesOf(packed)
    : new Uint8Array(packed.buffer, packed.byteOffset, packed.byteLength);
};

const mount = (model, el) => {
  const name = model.get("view");
  const host = el.closest(".opd") ?? el;
  host.classList.add("opd", `opd-${name}`);
  // Or JupyterLab takes `x` for cutting the cell. It looks from the focused node upwards, so the mark must be on that node.
  const guard = ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", "true");
  host.addEventListener("focusin", guard);
  const note = make(
    "div",
    "opd-detached",
    "detached: run the cell again (or wait, if Python is busy)",
  );
  note.title =
    "Python does not answer. After a restart of the kernel the view goes on by itself, but Python does not hear of it.";
  note.hidden = true;
  note.setAttribute("role", "status");
  let undo = () => {};
  const draw = () => {
    undo();
    const data = decode(packedOf(model));
    const box = make("div", "opd-box");
    const state = connect(model, data.text?.texts ?? [], (mute) => (note.hidden = !mute));
    const undoView = views[name]({ box, data, state });
    el.replaceChildren(box, note); // only now: whatever fails above leaves the static picture
    undo = () => (undoView?.(), state.close());
  };
  draw();
  model.on("change:packed", draw);
  return () => (
    model.off("change:packed", draw),
    host.removeEventListener("focusin", guard),
    undo(),
    el.replaceChildren()
  );
};

for (const root of document.querySelectorAll(".opd:not([data-mounted])")) {
  const block = root.querySelector("script.opd-data");
  const found = block && JSON.parse(block.textContent);
  if (!found || !(found.view in views)) continue;
  root.setAttribute("data-mounted", "");
  mount(
    fakeModel({ ...found.traits, view: found.view, packed: found.packed }),
    root.querySelector(".opd-view"),
  );
}

export default { render: ({ model, el }) => mount(model, el) };
