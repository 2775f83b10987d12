// Mounts views: as a widget (the default export), and every HTML output on the page whose view this module knows.

/** @import { Model } from "./types.js" */

import { make, put, views } from "./core.js";
import { bytesOf, decode } from "./payload.js";
import { connect, fakeModel } from "./state.js";

/** @param {Model} model */
const packedOf = (model) => {
  const packed = model.get("packed");
  return typeof packed === "string"
    ? bytesOf(packed)
    : new Uint8Array(packed.buffer, packed.byteOffset, packed.byteLength);
};

const detachedNote = () => {
  const note = make(
    "div",
    "opd-detached",
    "detached: run the cell again (or wait, if Python is busy)",
  );
  note.title =
    "Python does not answer. After a restart of the kernel the view goes on by itself, but Python does not hear of it.";
  note.hidden = true;
  return put(note, { role: "status" });
};

/**
 * Draw the view that a model describes into a node, again whenever its payload changes.
 * @param {Model} model
 * @param {HTMLElement} holder
 */
const mount = (model, holder) => {
  const name = model.get("view");
  const host = holder.closest(".opd") ?? holder;
  host.classList.add("opd", `opd-${name}`);
  // Or JupyterLab takes `x` for cutting the cell. It looks from the focused node upwards, so the mark must be on that node.
  /** @param {Event} event */
  const guard = ({ target }) => {
    if (target instanceof Element) put(target, { "data-lm-suppress-shortcuts": "true" });
  };
  host.addEventListener("focusin", guard);
  const note = detachedNote();
  let undo = () => {};
  const draw = () => {
    undo();
    const data = decode(packedOf(model));
    const box = make("div", "opd-box");
    const state = connect(model, data.text?.texts ?? [], (isMute) => {
      note.hidden = !isMute;
    });
    const undoView = views[name]({ box, data, state });
    holder.replaceChildren(box, note); // only now: whatever fails above leaves the static picture
    undo = () => {
      undoView?.();
      state.close();
    };
  };
  draw();
  model.on("change:packed", draw);
  return () => {
    model.off("change:packed", draw);
    host.removeEventListener("focusin", guard);
    undo();
    holder.replaceChildren();
  };
};

for (const root of document.querySelectorAll(".opd:not([data-mounted])")) {
  const block = root.querySelector("script.opd-data");
  const holder = root.querySelector(".opd-view");
  const found = block && JSON.parse(block.textContent);
  if (found && found.view in views && holder instanceof HTMLElement) {
    put(root, { "data-mounted": "" });
    mount(fakeModel({ ...found.traits, view: found.view, packed: found.packed }), holder);
  }
}

/** @param {{ model: Model, el: HTMLElement }} widget */
const render = ({ model, el: holder }) => mount(model, holder);

export default { render };
