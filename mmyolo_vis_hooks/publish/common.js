  const page = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const root = document.documentElement;
  const asset = (name, part) => `${page.assets}/${encodeURIComponent(name)}.${part}.jpg`;
  const plural = (n, one, many) => `${n} ${n === 1 ? one : many}`;

  function make(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function paint(node, label) {
    node.style.setProperty("--fill", label.fill);
    node.style.setProperty("--ink", label.ink);
    return node;
  }

  function makeImage(src, alt, className) {
    return make("img", { loading: "lazy", decoding: "async", alt, className, src });
  }

  // A list of labels to tick; those that are ticked are in the set.
  function fillMenu(list, labels, ticked, changed) {
    labels.forEach((label, i) => {
      const input = make("input", { type: "checkbox", value: i });
      input.addEventListener("change", () => {
        if (input.checked) ticked.add(i); else ticked.delete(i);
        changed();
      });
      const dots = label.fill ? [paint(make("span", { className: "dot" }), label)] : [];
      const name = make("span", { className: "name", textContent: label.name });
      const count = make("span", { className: "count", textContent: label.count });
      list.append(make("li", {}, make("label", {}, input, ...dots, name, count)));
    });
  }

  function nameTicked(labels, ticked, all, many) {
    const names = [...ticked].map((i) => labels[i].name);
    return names.length === 0 ? all : names.length > 3 ? `${names.length} ${many}` : names.join(", ");
  }

  function setStrength() {
    const value = Number(at("strength").value);
    root.style.setProperty("--strength", value);
    at("strength-value").textContent = `${Math.round(value * 100)} %`;
  }

  // Keys, menus that close, and pictures that are missing.
  function listenEverywhere(go) {
    const menus = [...document.querySelectorAll("details.menu")];
    at("strength").addEventListener("input", setStrength);
    at("previous").addEventListener("click", () => go(-1));
    at("next").addEventListener("click", () => go(1));
    document.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (event.key === "Escape") {
        for (const menu of menus) menu.open = false;
        if (document.activeElement instanceof HTMLInputElement) document.activeElement.blur();
      }
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const inUse = event.target instanceof Element && event.target.closest("input:not([type=checkbox]), select, textarea");
      if (!step || inUse) return;
      event.preventDefault();
      go(step);
    });
    document.addEventListener("pointerdown", (event) => {
      for (const menu of menus) if (!menu.contains(event.target)) menu.open = false;
    });
    document.addEventListener("error", (event) => {
      const image = event.target;
      const frame = image instanceof HTMLImageElement && image.closest(".frame");
      if (!frame) return;
      const text = `${decodeURIComponent(image.getAttribute("src"))} is missing; keep the folder ${page.assets} beside this page.`;
      frame.append(make("div", { className: "missing", textContent: text }));
    }, true);
    new ResizeObserver(() => {
      root.style.setProperty("--bar-height", getComputedStyle(at("bar")).position === "sticky" ? `${at("bar").offsetHeight}px` : "0px");
    }).observe(at("bar"));
  }
