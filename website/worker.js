// A page that was opened from disk may start no worker, and the search is one. Here a hidden frame
// of the same page runs the worker's script in its place. Pages from a server keep real workers.
if (location.protocol === "file:") {
  // As between a page and a worker, messages are copies, and arrive later.
  const send = (message, receive) => {
    const data = structuredClone(message);
    setTimeout(() => receive(new MessageEvent("message", { data })));
  };

  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (answer) =>
        send(answer, (event) => {
          this.dispatchEvent(event);
          this.onmessage?.(event);
        });
      const script = inside.document.createElement("script");
      script.src = new URL(address, location.href).href;
      script.onload = () => {
        this.inside = inside;
        this.waiting.splice(0).forEach((message) => this.postMessage(message));
      };
      script.onerror = (event) => this.onerror?.(event);
      inside.document.head.append(script);
    }

    postMessage(message) {
      if (this.inside) send(message, (event) => this.inside.dispatchEvent(event));
      else this.waiting.push(message);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
