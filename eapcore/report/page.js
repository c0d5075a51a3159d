"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { layout, compare } = data;
  const byId = (id) => document.getElementById(id);
  const MOST_DRAWN = 2000;

  // Data

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const nReceivers = layout.receivers.length;
  const senderNames = layout.senders.map((s) => s[0]);
  const receiverNames = layout.receivers.map((r) => r[0]);

  /** A run's edges from the most important down, each {flat, s, r, score, rank}. */
  function unpack(run) {
    const flat = new Int32Array(bytes(run.edges)), scores = new Float32Array(bytes(run.scores));
    run.beside = Object.entries(run.beside).map(([name, values]) => [name, new Float32Array(bytes(values))]);
    run.list = Array.from(flat, (f, rank) => ({
      flat: f, s: Math.floor(f / nReceivers), r: f % nReceivers, score: scores[rank], rank: rank + 1,
    }));
    run.at = new Map(run.list.map((edge) => [edge.flat, edge]));
    run.inside = run.circuit === null ? null
      : new Set(Array.from(new Int32Array(bytes(run.circuit)), (rank) => flat[rank]));
    run.most = run.list.reduce((most, e) => (Number.isFinite(e.score) ? Math.max(most, Math.abs(e.score)) : most), 0) || 1;
    run.measured = new Map(run.exact.map(([s, r, estimate, effect]) => [s * nReceivers + r, { estimate, effect }]));
  }
  data.runs.forEach(unpack);
  const state = { run: 0, n: 0, set: "top", sign: "all", node: null, paths: false };
  const current = () => data.runs[state.run];

  const inUnit = (text) => (current().unit ? `${text} (${current().unit})` : text);
  const edgeName = (edge) => `${senderNames[edge.s]} → ${receiverNames[edge.r]}`;
  const number = (x) => (x === null || x === undefined || Number.isNaN(x) ? "–"
    : x === 0 ? "0" : Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5 ? String(Number(x.toPrecision(4))) : x.toExponential(2));
  const round = (x) => (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ? x.toExponential(0) : String(Number(x.toPrecision(1)))); // to one digit
  const count = (n) => n.toLocaleString("en");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const share = (score, run) => Math.min(1, Math.abs(score) / run.most); // infinities are as wide as the largest number
  const signOf = (score) => (score < 0 ? "negative" : score > 0 ? "positive" : "zero");

  // Elements

  const SVG = "http://www.w3.org/2000/svg";
  function fill(element, attributes, children) {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "text") element.textContent = value;
      else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) element.setAttribute(key, value);
    }
    for (const child of children || []) element.append(child);
    return element;
  }
  const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const absent = (text) => html("p", { class: "absent", text });
  const widthOf = (element) => Math.max(240, Math.floor(element.clientWidth || element.parentElement.clientWidth));

  // A tip beside the pointer, or beside what the keyboard is on

  const tip = byId("tip");
  function showTip(text, x, y) {
    if (tip.textContent !== text) tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
  }
  const hideTip = () => { tip.hidden = true; };
  addEventListener("scroll", hideTip, { passive: true });

  // The circuit

  const drawing = byId("drawing"), slider = byId("count"), exactly = byId("count-number");
  let places = null; // of the nodes, in pixels
  let drawn = []; // the edges that are drawn, each with its path and points along it
  let paths = new Map(); // an edge's key → its drawn form, kept while the slider moves
  let nodes = []; // of each sender but the embedding, with it, and the logits

  /** The edges that may be drawn, the most important first. */
  function candidates() {
    const keep = (edge) => state.sign === "all" || (state.sign === "-" ? edge.score < 0 : edge.score > 0);
    const run = current();
    if (state.set === "circuit") return run.list.filter((edge) => run.inside.has(edge.flat) && keep(edge));
    return run.list.filter(keep);
  }

  /** What is to be drawn: {key, s, r, width, kind, text}, thin lines first. */
  function chosenEdges() {
    if (state.set !== "compare") {
      const run = current();
      return candidates().slice(0, state.n).map((edge) => ({
        key: `${edge.flat}`, s: edge.s, r: edge.r, score: edge.score, kind: signOf(edge.score),
        width: share(edge.score, run),
        text: `${edgeName(edge)}\nscore ${number(edge.score)}, rank ${count(edge.rank)} of ${count(layout.n_edges)}`
          + (run.measured.has(edge.flat) ? `\nexact effect ${number(run.measured.get(edge.flat).effect)}` : ""),
      }));
    }
    const [a, b] = data.runs.map((run) => new Map(run.list.slice(0, state.n).map((edge) => [edge.flat, edge])));
    const flats = [...new Set([...a.keys(), ...b.keys()])];
    return flats.map((flat) => {
      const edge = a.get(flat) || b.get(flat);
      const found = data.runs.map((run) => run.at.get(flat));
      const width = Math.max(...found.map((e, i) => (e ? share(e.score, data.runs[i]) : 0)));
      return {
        key: `${flat}c`, s: edge.s, r: edge.r, score: edge.score, width,
        kind: a.has(flat) && b.has(flat) ? "both" : a.has(flat) ? "only-0" : "only-1",
        text: [edgeName(edge), ...found.map((e, i) => `${data.runs[i].name}: `
          + (e ? `${number(e.score)}, rank ${count(e.rank)}` : "not among the edges of this page"))].join("\n"),
      };
    }).filter((edge) => state.sign === "all" || (state.sign === "-" ? edge.score < 0 : edge.score > 0))
      .sort((x, y) => y.width - x.width);
  }

  function measure() {
    const room = widthOf(drawing), left = room < 560 ? 20 : 46, right = room < 560 ? 22 : 60; // on the right edges bow out
    const column = Math.max(17, Math.min(104, (room - left - right) / layout.columns));
    const row = Math.max(40, Math.min(74, 940 / layout.rows));
    const radius = Math.max(5, Math.min(11, column * 0.3));
    const width = Math.max(room, left + right + column * layout.columns);
    const height = row * layout.rows + 12;
    const start = left + Math.max(0, (room - left - right - column * layout.columns) / 2);
    const x = (at) => start + (at + 0.5) * column, y = (at) => height - 8 - (at + 0.5) * row;
    return {
      width, height, right, column, row, radius, x, y,
      senders: layout.senders.map(([, c, r]) => [x(c), y(r)]),
      receivers: layout.receivers.map(([, c, r]) => [x(c), y(r)]),
    };
  }

  /** The sender whose node a receiver's edges end in; −1 for the logits. */
  const nodeOf = (r) => (layout.behind[r].length ? layout.behind[r][0] : -1);
  const nodesOf = (r) => (layout.behind[r].length ? layout.behind[r] : [-1]);
  const nodeName = (node) => (node < 0 ? "logits" : senderNames[node]);

  function prepareDrawing() {
    places = measure();
    paths = new Map();
    const graph = layout.graph;
    const picture = svg("svg", {
      width: places.width, height: places.height, viewBox: `0 0 ${places.width} ${places.height}`, id: "picture",
      role: "group", "aria-label": "The circuit: nodes by layer, and the edges between them. Tab goes to a node, arrow "
        + "keys to its neighbours, Enter follows its edges, Escape shows all.",
    });
    for (let layer = 0; layer < graph.n_layers; layer += 1) {
      const top = places.y(layer + 1.64);
      if (layer % 2 === 0) picture.append(svg("rect", { class: "band", x: 0, y: top, width: places.width, height: places.row }));
      picture.append(svg("text", { x: 4, y: places.y(layer + 1) + 4, text: places.width < 560 ? layer : `layer ${layer}` }));
    }
    picture.append(svg("g", { id: "lines" }), svg("g", { id: "ports" }));
    const group = svg("g", { id: "nodes" });
    nodes = [...senderNames.keys(), -1].map((node) => {
      const [x, y] = node < 0 ? places.receivers[nReceivers - 1] : places.senders[node];
      const name = nodeName(node), head = /^a\d+\.h(\d+)$/.exec(name);
      const label = head ? head[1] : name;
      const wide = head ? 0 : Math.max(places.radius * 2, 8 + label.length * 6.2);
      const shape = head ? svg("circle", { cx: x, cy: y, r: places.radius })
        : svg("rect", { x: x - wide / 2, y: y - 9, width: wide, height: 18, rx: 4 });
      const element = svg("g", {
        class: "node", "data-node": name, "aria-label": name, role: "button",
        onclick: () => choose(state.node === node ? null : node),
        onfocus: () => tipAtNode(node), onblur: hideTip, onkeydown: (event) => keyOnNode(event, node),
      }, shape);
      if (!head || places.radius >= 6.5) element.append(svg("text", { x, y: y + 0.5, text: label }));
      group.append(element);
      return { node, name, x, y, element, half: head ? places.radius : 9, on: false };
    });
    picture.append(group);
    picture.addEventListener("pointermove", (event) => nearest(event));
    picture.addEventListener("pointerleave", () => { mark(null); hideTip(); });
    drawing.replaceChildren(picture);
  }

  function pathOf(edge) {
    const known = paths.get(edge.key);
    if (known) {
      known.element.setAttribute("class", `edge ${edge.kind}`); // of both runs or of one: it depends on how many are drawn
      return Object.assign(known, edge);
    }
    const [x0, y0] = places.senders[edge.s], [x1, y1] = places.receivers[edge.r];
    const from = nodes[edge.s], into = nodeOf(edge.r) < 0 ? nodes[nodes.length - 1] : nodes[nodeOf(edge.r)];
    const a = y0 - from.half, b = y1 + into.half + 3, bend = Math.max(14, Math.abs(a - b) * 0.45);
    // An edge straight up past other nodes goes round them.
    const rows = (y0 - y1) / places.row, straight = Math.abs(x0 - x1) < places.column * 0.4 && rows > 1.6;
    const free = x0 > places.senders[places.senders.length - 1][0] - 1 && layout.graph.has_mlp ? places.right : places.column * 0.5;
    const bow = straight ? 1.25 * free * Math.min(1, 0.35 + rows / layout.rows) : 0;
    const points = [];
    const steps = 16;
    for (let i = 0; i <= steps; i += 1) {
      const t = i / steps, u = 1 - t;
      points.push(u * u * u * x0 + 3 * u * u * t * (x0 + bow) + 3 * u * t * t * (x1 + bow) + t * t * t * x1,
        u * u * u * a + 3 * u * u * t * (a - bend) + 3 * u * t * t * (b + bend) + t * t * t * b);
    }
    const element = svg("path", {
      class: `edge ${edge.kind}`, d: `M${x0} ${a}C${x0 + bow} ${a - bend} ${x1 + bow} ${b + bend} ${x1} ${b}`,
      "stroke-width": Math.max(0.9, 7 * edge.width).toFixed(2), "data-edge": `${senderNames[edge.s]}->${receiverNames[edge.r]}`,
    });
    const made = { ...edge, element, points };
    paths.set(edge.key, made);
    return made;
  }

  function drawEdges() {
    const chosen = chosenEdges();
    drawn = chosen.map(pathOf);
    const lines = byId("lines"), picture = byId("picture");
    lines.replaceChildren(...drawn.map((edge) => edge.element).reverse());
    const used = new Set(), ports = new Set();
    for (const edge of drawn) {
      used.add(edge.s);
      nodesOf(edge.r).forEach((node) => used.add(node));
      ports.add(edge.r);
    }
    if (state.node !== null && !used.has(state.node)) state.node = null;
    for (const node of nodes) {
      node.on = used.has(node.node);
      node.element.classList.toggle("on", node.on);
      node.element.removeAttribute("tabindex");
    }
    const first = nodes.find((node) => node.node === state.node) || nodes.find((node) => node.on);
    if (first) first.element.setAttribute("tabindex", "0");
    byId("ports").replaceChildren(...[...ports].flatMap((r) => {
      const part = /<(.)>$/.exec(receiverNames[r]);
      if (!part) return [];
      const [x, y] = places.receivers[r], below = y + places.radius + 3;
      const dot = svg("circle", { class: "port", cx: x, cy: below, r: Math.min(2.2, places.column / 12) });
      return places.column < 44 ? [dot] : [dot, svg("text", { class: "port-name", x, y: below + 10, text: part[1] })];
    }));
    follow(picture);
    says();
  }

  /** Edges up and down from the followed node; with whole paths, all that reach it or that it reaches. */
  function followedEdges() {
    if (state.node === null) return new Set();
    const found = new Set();
    const sweep = (start, next) => {
      const seen = new Set([start]), todo = [start];
      while (todo.length) {
        const node = todo.pop();
        for (const edge of drawn) {
          const [near, far] = next(edge);
          if (!near.includes(node)) continue;
          found.add(edge);
          if (!state.paths) continue;
          for (const other of far) {
            if (!seen.has(other)) {
              seen.add(other);
              todo.push(other);
            }
          }
        }
      }
    };
    sweep(state.node, (edge) => [[edge.s], nodesOf(edge.r)]);
    sweep(state.node, (edge) => [nodesOf(edge.r), [edge.s]]);
    return found;
  }

  function follow(picture) {
    const found = followedEdges(), touched = new Set();
    picture.classList.toggle("following", state.node !== null);
    for (const edge of drawn) {
      edge.element.classList.toggle("followed", found.has(edge));
      if (found.has(edge)) [edge.s, ...nodesOf(edge.r)].forEach((node) => touched.add(node));
    }
    for (const node of nodes) {
      node.element.classList.toggle("followed", touched.has(node.node) || node.node === state.node);
      node.element.classList.toggle("chosen", node.node === state.node && state.node !== null);
      node.element.setAttribute("aria-pressed", String(node.node === state.node && state.node !== null));
    }
    byId("clear").disabled = state.node === null;
    const box = byId("followed");
    if (state.node === null) return box.replaceChildren();
    const list = (title, edges, end) => html("div", {}, html("h3", { text: title }),
      html("div", { class: "scroll" }, html("table", {}, ...edges.slice(0, 60).map((edge) => html("tr", {},
        html("td", {}, html("button", { type: "button", text: end(edge)[0], onclick: () => choose(end(edge)[1]) })),
        html("td", { class: `number ${signOf(edge.score)}-text`, text: number(edge.score) }))))));
    const into = drawn.filter((edge) => nodesOf(edge.r).includes(state.node));
    const out = drawn.filter((edge) => edge.s === state.node);
    const name = nodeName(state.node);
    box.replaceChildren(html("div", { class: "pair" },
      list(`${count(into.length)} drawn edges into ${name}`, into,
        (edge) => [`${senderNames[edge.s]} → ${receiverNames[edge.r]}`, edge.s]),
      list(`${count(out.length)} out of ${name}`, out, (edge) => [receiverNames[edge.r], nodeOf(edge.r)])));
  }

  function choose(node) {
    state.node = node;
    follow(byId("picture"));
    if (node !== null) {
      for (const other of nodes) other.element.removeAttribute("tabindex");
      const found = nodes.find((other) => other.node === node);
      found.element.setAttribute("tabindex", "0");
    }
  }

  function tipAtNode(node) {
    const found = nodes.find((other) => other.node === node), box = found.element.getBoundingClientRect();
    const into = drawn.filter((edge) => nodesOf(edge.r).includes(node)).length;
    const out = drawn.filter((edge) => edge.s === node).length;
    showTip(`${found.name}\n${count(into)} drawn edges in, ${count(out)} out`, box.right - 10, box.bottom - 14);
  }

  function keyOnNode(event, node) {
    const here = nodes.find((other) => other.node === node);
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(state.node === node ? null : node);
    } else if (event.key === "Escape") {
      choose(null);
      here.element.setAttribute("tabindex", "0");
    } else if (step) {
      event.preventDefault();
      let best = null, least = Infinity;
      for (const other of nodes) {
        const dx = other.x - here.x, dy = other.y - here.y;
        const along = dx * step[0] + dy * step[1], across = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
        if (!other.on || along < 1 || other === here) continue;
        const far = step[0] ? along + 8 * across : along * 4 + across;
        if (far < least) [best, least] = [other, far];
      }
      if (best) {
        here.element.removeAttribute("tabindex");
        best.element.setAttribute("tabindex", "0");
        best.element.focus();
      }
    }
  }

  let marked = null;
  function mark(edge) {
    if (marked) marked.element.classList.remove("near");
    marked = edge;
    if (edge) edge.element.classList.add("near");
  }

  function nearest(event) {
    const box = byId("picture").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const node = nodes.find((other) => Math.abs(other.x - x) <= other.half + 2 && Math.abs(other.y - y) <= other.half + 2);
    if (node && node.on) {
      mark(null);
      return tipAtNode(node.node);
    }
    const seen = state.node === null ? drawn : drawn.filter((edge) => edge.element.classList.contains("followed"));
    let best = null, least = 7 * 7;
    for (const edge of seen) {
      const p = edge.points;
      for (let i = 0; i + 3 < p.length; i += 2) {
        const dx = p[i + 2] - p[i], dy = p[i + 3] - p[i + 1], length = dx * dx + dy * dy || 1;
        const t = Math.max(0, Math.min(1, ((x - p[i]) * dx + (y - p[i + 1]) * dy) / length));
        const ex = p[i] + t * dx - x, ey = p[i + 1] + t * dy - y, far = ex * ex + ey * ey;
        if (far < least) [best, least] = [edge, far];
      }
    }
    mark(best);
    if (best) showTip(best.text, event.clientX, event.clientY);
    else hideTip();
  }

  /** The slider goes from 0 to 1,000 on a logarithmic axis, on which every small number has a place. */
  function sizeAt(place, most) {
    return place <= 0 ? 0 : Math.min(most, Math.max(1, Math.round(Math.exp((place / 1000) * Math.log(most + 1)) - 1)));
  }
  const placeOf = (n, most) => (most ? Math.round((1000 * Math.log(n + 1)) / Math.log(most + 1)) : 0);
  const most = () => Math.min(MOST_DRAWN, state.set === "compare" ? data.runs[0].list.length : candidates().length);

  function says() {
    const total = state.set === "compare" || (state.set === "top" && state.sign === "all") ? layout.n_edges : candidates().length;
    const limit = total > MOST_DRAWN ? ` (the drawing takes up to ${count(MOST_DRAWN)})` : "";
    byId("count-says").textContent = state.set === "compare"
      ? `The top ${count(state.n)} edges of each run${limit}: ${count(drawn.filter((e) => e.kind === "both").length)} of both, `
        + data.runs.map((run, i) => `${count(drawn.filter((e) => e.kind === `only-${i}`).length)} of ${run.name} alone`).join(", ") + "."
      : `${count(drawn.length)} of ${count(total)} edges${limit}.`;
    slider.setAttribute("aria-valuetext", `${state.n} edges`);
    const legend = state.set === "compare"
      ? [["var(--both)", "of both runs"], ...data.runs.map((run, i) => [`var(--run-${i})`, `of ${run.name} alone`])]
      : [["var(--negative)", `negative score${current().signed ? ": the behaviour needs the edge" : ""}`],
        ["var(--positive)", `positive score${current().signed ? ": it hinders" : ""}`]];
    byId("legend").replaceChildren(...legend.map(([stroke, text]) => html("li", {},
      html("b", { style: `color:${stroke}` }), text)),
    html("li", { text: "width: |score|; an edge enters a head at q (left), k (middle) or v (right)" }));
  }

  let waiting = false;
  function draw(n) {
    const limit = most();
    state.n = Math.max(0, Math.min(limit, n));
    exactly.max = limit;
    if (document.activeElement !== exactly) exactly.value = state.n;
    if (Number(slider.value) !== placeOf(state.n, limit) && sizeAt(Number(slider.value), limit) !== state.n) {
      slider.value = placeOf(state.n, limit);
    }
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawEdges();
      if (compare) differences();
    });
  }
  slider.addEventListener("input", () => {
    exactly.value = sizeAt(Number(slider.value), most());
    draw(sizeAt(Number(slider.value), most()));
  });
  exactly.addEventListener("input", () => {
    if (exactly.value !== "") draw(Math.floor(Number(exactly.value)) || 0);
  });
  exactly.addEventListener("change", () => { exactly.value = state.n; });
  byId("sign").addEventListener("change", (event) => { state.sign = event.target.value; draw(state.n); });
  byId("paths").addEventListener("change", (event) => { state.paths = event.target.checked; follow(byId("picture")); });
  byId("clear").addEventListener("click", () => choose(null));
  addEventListener("keydown", (event) => { if (event.key === "Escape") { hideTip(); if (state.node !== null) choose(null); } });

  function chooseSet() {
    const options = [["top", "the top by |score|"]];
    if (current().inside) options.push(["circuit", "the circuit"]);
    if (compare) options.push(["compare", "both runs"]);
    if (!options.some(([value]) => value === state.set)) state.set = "top";
    byId("set").replaceChildren(...options.map(([value, text]) => html("option", { value, text })));
    byId("set").value = state.set;
  }
  byId("set").addEventListener("change", (event) => {
    state.set = event.target.value;
    draw(state.n);
  });

  // The difference of two runs

  function differences() {
    const tops = data.runs.map((run) => run.list.slice(0, state.n));
    const sets = tops.map((top) => new Set(top.map((edge) => edge.flat)));
    tops.forEach((top, i) => {
      const only = top.filter((edge) => !sets[1 - i].has(edge.flat));
      byId(`only-${i}-says`).textContent = `${count(only.length)} of the top ${count(state.n)} of ${data.runs[i].name} alone`;
      byId(`only-${i}`).replaceChildren(html("thead", {}, html("tr", {}, ...["edge", "score", "rank", "rank there"].map(
        (text, k) => html("th", { scope: "col", class: k ? "number" : null, text })))),
      html("tbody", {}, ...only.slice(0, 200).map((edge) => html("tr", {},
        html("td", { text: edgeName(edge) }),
        html("td", { class: `number ${signOf(edge.score)}-text`, text: number(edge.score) }),
        html("td", { class: "number", text: count(edge.rank) }),
        html("td", { class: "number", text: data.runs[1 - i].at.has(edge.flat) ? count(data.runs[1 - i].at.get(edge.flat).rank) : "–" })))));
    });
  }

  // The table of edges

  const COLUMNS = [ // its name, a cell, whether this is a number, and by what it is sorted, if not by the cell
    ["rank", (edge) => edge.rank, true],
    ["edge", (edge) => edgeName(edge), false, (edge) => edge.flat],
    ["score", (edge) => edge.score, true],
    ["|score|", (edge) => Math.abs(edge.score), true],
  ];
  const table = { column: "rank", down: false, shown: 25, find: "" };
  function columns() {
    const run = current();
    const more = run.beside.map(([name, values]) => [name, (edge) => values[edge.rank - 1], true]);
    if (run.inside) more.push(["in circuit", (edge) => (run.inside.has(edge.flat) ? "yes" : ""), false]);
    if (run.measured.size) {
      more.push(["exact", (edge) => (run.measured.has(edge.flat) ? run.measured.get(edge.flat).effect : null), true]);
    }
    if (compare) {
      const other = data.runs[1 - state.run];
      more.push([`in ${other.name}`, (edge) => (other.at.has(edge.flat) ? other.at.get(edge.flat).score : null), true]);
    }
    return [...COLUMNS, ...more];
  }
  function fillTable() {
    const run = current(), shown = columns();
    if (!shown.some(([name]) => name === table.column)) table.column = "rank";
    const [, cell, , key] = shown.find(([name]) => name === table.column), value = key || cell;
    const words = table.find.toLowerCase().split(/\s+/).filter(Boolean);
    let rows = run.list;
    if (words.length) {
      rows = rows.filter((edge) => {
        const text = `${senderNames[edge.s]}->${receiverNames[edge.r]} ${edgeName(edge)}`.toLowerCase();
        return words.every((word) => text.includes(word));
      });
    }
    if (table.column !== "rank" || table.down) {
      rows = rows.map((edge) => [value(edge), edge]);
      const empty = (x) => x === null || Number.isNaN(x);
      rows.sort(([a, e], [b, f]) => {
        if (empty(a) || empty(b)) return empty(a) - empty(b) || e.rank - f.rank; // what is not there stands last
        const order = a < b ? -1 : a > b ? 1 : 0;
        return (table.down ? -order : order) || e.rank - f.rank;
      });
      rows = rows.map(([, edge]) => edge);
    }
    byId("table").tHead.replaceChildren(html("tr", {}, ...shown.map(([name, , numeric]) => html("th", {
      scope: "col", class: numeric ? "number" : null,
      "aria-sort": name !== table.column ? "none" : table.down ? "descending" : "ascending",
    }, html("button", {
      type: "button", "data-column": name, text: name + (name === table.column ? (table.down ? " ▾" : " ▴") : ""),
      onclick: () => {
        table.down = table.column === name ? !table.down : name === "score" ? false : numeric && name !== "rank";
        table.column = name;
        fillTable();
        byId("table").querySelector(`[data-column="${CSS.escape(name)}"]`).focus();
      },
    }))), html("th", { "aria-hidden": "true" })));
    byId("table").tBodies[0].replaceChildren(...rows.slice(0, table.shown).map((edge) => html("tr", {},
      ...shown.map(([name, cell, numeric]) => {
        const x = cell(edge);
        const sizes = ["rank", "|score|", ...run.beside.map(([beside]) => beside)];
        const sign = numeric && !sizes.includes(name) && x !== null ? ` ${signOf(x)}-text` : "";
        return html("td", { class: numeric ? `number${sign}` : null, text: name === "rank" ? count(x) : numeric ? number(x) : x });
      }),
      html("td", { class: "bars", "aria-hidden": "true" }, html("span", {
        class: "bar", style: `width:${(100 * share(edge.score, run)).toFixed(2)}%;background:var(--${edge.score < 0 ? "negative" : "positive"})`,
      })))));
    const held = run.list.length < layout.n_edges ? `; the page holds the top ${count(run.list.length)} of ${count(layout.n_edges)}` : "";
    byId("table-says").textContent = `${count(Math.min(table.shown, rows.length))} of ${count(rows.length)} edges${held}`;
    byId("more").hidden = rows.length <= table.shown;
  }
  byId("more").addEventListener("click", () => { table.shown = Math.min(2000, table.shown * 4); fillTable(); });
  let typing = 0;
  byId("find").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => { table.find = event.target.value; table.shown = 25; fillTable(); }, 120);
  });

  // Heat maps

  function rgb(name) {
    const text = colour(name).slice(1);
    return [0, 2, 4].map((i) => parseInt(text.slice(i, i + 2), 16));
  }

  /** A canvas of rows (up) × columns with a cursor; value(i, j) is null where there is no cell. */
  function heatMap(box, id, rows, cols, rowName, colName, value, label, ticks) {
    const sizes = [];
    for (let i = 0; i < rows; i += 1) {
      for (let j = 0; j < cols; j += 1) {
        const x = value(i, j);
        if (x !== null && Number.isFinite(x)) sizes.push(Math.abs(x));
      }
    }
    sizes.sort((a, b) => b - a);
    const largest = sizes[0] || 0, full = sizes[sizes.length > 5000 ? Math.floor(sizes.length / 1000) : 0] || largest; // from here on full colour
    const left = 44, bottom = 18, room = Math.max(widthOf(box), left + cols / 3 + 4);
    const cell = Math.min(26, (room - left - 4) / cols);
    const width = Math.floor(left + cell * cols + 4), height = Math.max(40, Math.round(rows * Math.max(Math.min(14, 260 / rows), Math.min(cell, 300 / rows))));
    const tall = height / rows, scale = devicePixelRatio || 1;
    const canvas = html("canvas", {
      id, width: Math.round(width * scale), height: Math.round((height + bottom) * scale), tabindex: "0", role: "img",
      style: `width:${width}px;height:${height + bottom}px`, "aria-label": `${label}; largest |value| ${number(largest)}`,
    });
    const pen = canvas.getContext("2d"), paper = rgb("--card"), none = rgb("--page");
    const ends = { "-": rgb("--negative"), "+": rgb("--positive") };
    // A pixel that covers several cells shows the largest of them.
    const wide = Math.min(cols, Math.max(1, Math.floor(cell * cols * scale))), high = Math.min(rows, Math.floor(height * scale));
    const shown = new Array(wide * high).fill(null);
    for (let i = 0; i < rows; i += 1) {
      for (let j = 0; j < cols; j += 1) {
        const x = value(i, j), at = (high - 1 - Math.floor((i * high) / rows)) * wide + Math.floor((j * wide) / cols);
        if (x !== null && (shown[at] === null || Math.abs(x) > Math.abs(shown[at]))) shown[at] = x;
      }
    }
    const image = new ImageData(wide, high);
    shown.forEach((x, at) => {
      const end = x < 0 ? ends["-"] : ends["+"], share = x === null || !full ? 0 : Math.min(1, Math.sqrt(Math.abs(x) / full));
      for (let k = 0; k < 3; k += 1) image.data[4 * at + k] = x === null ? none[k] : paper[k] + share * (end[k] - paper[k]);
      image.data[4 * at + 3] = 255;
    });
    const small = html("canvas", { width: wide, height: high });
    small.getContext("2d").putImageData(image, 0, 0);
    let cursor = null;
    const paint = () => {
      pen.setTransform(scale, 0, 0, scale, 0, 0);
      pen.clearRect(0, 0, width, height + bottom);
      pen.imageSmoothingEnabled = false;
      pen.drawImage(small, left, 0, cell * cols, height);
      pen.fillStyle = colour("--quiet");
      pen.font = "11px system-ui, sans-serif";
      pen.textBaseline = "middle";
      let last = Infinity;
      for (const [i, text] of ticks.rows) {
        const y = height - (i + 0.5) * tall;
        if (last - y < 12) continue;
        last = y;
        pen.textAlign = "right";
        pen.fillText(text, left - 5, Math.max(6, y));
      }
      last = -Infinity;
      for (const [j, text] of ticks.cols) {
        const x = left + (j + 0.5) * cell, w = pen.measureText(text).width;
        if (x - w / 2 - last < 5 || x + w / 2 > width) continue;
        last = x + w / 2;
        pen.textAlign = "center";
        pen.fillText(text, x, height + 10);
      }
      if (cursor) {
        pen.strokeStyle = colour("--ink");
        pen.lineWidth = 1.5;
        const w = Math.max(4, cell + 1), h = Math.max(4, tall + 1);
        pen.strokeRect(left + (cursor[1] + 0.5) * cell - w / 2, height - (cursor[0] + 0.5) * tall - h / 2, w, h);
      }
    };
    const at = (i, j) => {
      cursor = [i, j];
      paint();
      const x = value(i, j), place = canvas.getBoundingClientRect();
      showTip(`${rowName(i)} ${colName(j)}\n${x === null ? "no edge" : number(x)}`,
        place.left + left + (j + 0.5) * cell, place.top + height - (i + 0.5) * tall);
    };
    const leave = () => { cursor = null; paint(); hideTip(); };
    canvas.addEventListener("pointermove", (event) => {
      const place = canvas.getBoundingClientRect();
      const j = Math.floor((event.clientX - place.left - left) / cell), i = Math.floor((height - (event.clientY - place.top)) / tall);
      if (i >= 0 && i < rows && j >= 0 && j < cols) at(i, j);
      else leave();
    });
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [i, j] = cursor || [-1, 0];
      at(cursor ? Math.max(0, Math.min(rows - 1, i + step[0])) : 0, Math.max(0, Math.min(cols - 1, j + step[1])));
    });
    paint();
    const clipped = full < largest ? " or more" : "";
    box.replaceChildren(canvas, html("ul", { class: "legend" }, html("li", {}, `−${number(full)}${clipped && " or less"}`,
      html("b", { class: "scale" }), `${number(full)}${clipped}`), html("li", { text: `largest ${inUnit(number(largest))}` })));
  }

  function maps() {
    const run = current(), graph = layout.graph;
    const cells = new Map(run.list.map((edge) => [edge.flat, edge.score]));
    const before = new Int32Array(nReceivers);
    for (let r = 0; r < nReceivers; r += 1) before[r] = layout.before[r];
    const middles = (names) => {
      const found = new Map();
      names.forEach((name, i) => {
        const layer = /^[am](\d+)/.exec(name);
        const key = layer ? `layer ${layer[1]}` : name;
        if (!found.has(key)) found.set(key, []);
        found.get(key).push(i);
      });
      return [...found].map(([text, list]) => [(list[0] + list[list.length - 1]) / 2, text.replace("layer ", graph.n_layers > 8 ? "" : "layer ")]);
    };
    heatMap(byId("map"), "map-canvas", senderNames.length, nReceivers, (i) => `${senderNames[i]} →`, (j) => receiverNames[j],
      (i, j) => (i < before[j] ? cells.get(i * nReceivers + j) ?? 0 : null), "Scores of all edges, senders by receivers",
      { rows: middles(senderNames), cols: middles(receiverNames) });
    const positions = run.positions;
    if (!positions) {
      byId("positions").replaceChildren(absent("Not here: scores of each position (eapcore run --report, or eapcore attribute --reduce position, keep them)."));
      return;
    }
    const wide = positions.values[0].length;
    heatMap(byId("positions"), "positions-canvas", positions.names.length, wide, (i) => `edges into ${positions.names[i]}`,
      (j) => `at position ${j}`, (i, j) => positions.values[i][j], "Sums of scores, layers by positions",
      { rows: positions.names.map((name, i) => [i, name]), cols: [...Array(wide).keys()].map((j) => [j, String(j)]) });
  }

  // Charts

  /** Axes in a box; returns {picture, x, y} that map values to pixels. */
  function axes(box, { x, y, label, height = 250 }) {
    const width = widthOf(box), left = 52, right = 12, top = 10, bottom = 38;
    const map = (axis, from, to) => {
      const f = axis.log ? Math.log10 : (v) => v, a = f(axis.from), b = f(axis.to);
      return (v) => from + ((f(v) - a) / (b - a || 1)) * (to - from);
    };
    const mx = map(x, left, width - right), my = map(y, height - bottom, top);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    for (const tick of ticksOf(y, 5)) {
      picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: my(tick), y2: my(tick) }),
        svg("text", { x: left - 6, y: my(tick) + 4, "text-anchor": "end", text: (y.tick || number)(tick) }));
    }
    for (const tick of ticksOf(x, Math.max(3, Math.floor(width / 90)))) {
      picture.append(svg("line", { class: "grid", x1: mx(tick), x2: mx(tick), y1: top, y2: height - bottom }),
        svg("text", { x: mx(tick), y: height - bottom + 14, text: (x.tick || number)(tick),
          "text-anchor": mx(tick) > width - 2 * right - 10 ? "end" : "middle" }));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      svg("line", { class: "axis", x1: left, x2: left, y1: top, y2: height - bottom }),
      svg("text", { class: "title", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", text: x.title }),
      svg("text", { class: "title", x: 12, y: (top + height - bottom) / 2, "text-anchor": "middle",
        transform: `rotate(-90 12 ${(top + height - bottom) / 2})`, text: y.title }));
    box.replaceChildren(picture);
    return { picture, x: mx, y: my, bottom: height - bottom };
  }

  function ticksOf(axis, about) {
    if (axis.ticks) return axis.ticks;
    const found = [];
    if (axis.log) {
      const a = Math.ceil(Math.log10(axis.from) - 1e-9), b = Math.floor(Math.log10(axis.to) + 1e-9);
      const step = Math.max(1, Math.ceil((b - a + 1) / about));
      for (let k = a; k <= b; k += step) found.push(10 ** k);
      return found;
    }
    const rough = (axis.to - axis.from) / about, power = 10 ** Math.floor(Math.log10(rough || 1));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough) || power;
    for (let k = Math.ceil(axis.from / step - 1e-9); k * step <= axis.to + step * 1e-9; k += 1) found.push(k * step);
    return found;
  }

  const line = (points, stroke, more) => svg("polyline", {
    points: points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" "), fill: "none", stroke, "stroke-width": 2, ...more,
  });
  const dot = (x, y, stroke, text) => {
    const element = svg("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 3.4, fill: stroke, "fill-opacity": 0.75 });
    element.addEventListener("pointerenter", (event) => showTip(text, event.clientX, event.clientY));
    element.addEventListener("pointerleave", hideTip);
    return element;
  };
  const legendOf = (id, rows) => byId(id).replaceChildren(...rows.map(([stroke, text, dashed]) => html("li", {},
    html("b", { style: `color:${stroke};border-top-style:${dashed ? "dashed" : "solid"}` }), text)));

  /** Curves or points of all runs, each with its colour. */
  function series(part) {
    return data.runs.flatMap((run, i) => run[part].map((found, k) => ({
      ...found, name: compare ? `${run.name}: ${found.name}` : found.name,
      stroke: compare ? `var(--run-${i})` : ["var(--negative)", "var(--positive)", "var(--run-1)"][k % 3],
      dash: compare ? [null, "6 4", "2 3"][k % 3] : null,
    })));
  }

  function faithfulness() {
    const box = byId("faithfulness"), curves = series("curves").filter((curve) => curve.sizes.length);
    if (!curves.length) return box.replaceChildren(absent("Not here: a faithfulness curve (eapcore run and eapcore evaluate write one)."));
    const ends = curves.flatMap((curve) => [...curve.kept, ...(curve.intervals || []).flat()]).filter((f) => f !== null && Number.isFinite(f));
    const sizes = curves.flatMap((curve) => curve.sizes).filter((n) => n > 0);
    const low = Math.max(-1, Math.min(0, ...ends)), high = Math.min(2.5, Math.max(1, ...ends));
    const frame = axes(box, {
      x: { from: sizes.some((n) => n < layout.n_edges) ? Math.min(...sizes) : 1, to: Math.max(...sizes, layout.n_edges, 2), log: true,
        title: "edges in the circuit", tick: count },
      y: { from: low - 0.04, to: high + 0.04, title: "faithfulness" }, label: "Faithfulness over circuit size",
    });
    const inside = (f) => frame.y(Math.max(low - 0.04, Math.min(high + 0.04, f)));
    for (const f of [0, 1]) frame.picture.append(svg("line", { class: "axis", x1: frame.x(Math.min(...sizes)), x2: frame.x(layout.n_edges), y1: frame.y(f), y2: frame.y(f) }));
    for (const curve of curves) {
      const kept = curve.sizes.map((n, i) => [n, curve.kept[i], curve.intervals ? curve.intervals[i] : null]).filter(([n, f]) => n > 0 && f !== null);
      const banded = kept.filter(([, , ends]) => ends && ends.every((f) => f !== null));
      if (banded.length) {
        const around = [...banded.map(([n, , [a]]) => [frame.x(n), inside(a)]), ...banded.reverse().map(([n, , [, b]]) => [frame.x(n), inside(b)])];
        frame.picture.append(svg("polygon", { class: "interval", points: around.map((p) => p.join(",")).join(" "), fill: curve.stroke, opacity: 0.16 }));
      }
      frame.picture.append(line(kept.map(([n, f]) => [frame.x(n), inside(f)]), curve.stroke, { "stroke-dasharray": curve.dash }));
      for (const [n, f, interval] of kept) {
        if (interval && banded.length === 1) frame.picture.append(line(interval.map((end) => [frame.x(n), inside(end)]), curve.stroke));
        frame.picture.append(dot(frame.x(n), inside(f), curve.stroke, `${curve.name}\n${count(n)} edges: ${number(f)}`
          + (interval ? `\n95 %: ${number(interval[0])} to ${number(interval[1])}` : "")));
      }
    }
    legendOf("faithfulness-legend", curves.map((curve) => [curve.stroke, curve.name, curve.dash]));
  }

  function rocs() {
    const box = byId("roc"), found = series("rocs");
    if (!found.length) return box.replaceChildren(absent("Not here: a ROC (eapcore evaluate --true-circuit FILE, or --true-top N, writes one)."));
    const frame = axes(box, {
      x: { from: 0, to: 1, title: "false positive rate" }, y: { from: 0, to: 1, title: "true positive rate" }, label: "ROC",
    });
    frame.picture.append(line([[frame.x(0), frame.y(0)], [frame.x(1), frame.y(1)]], "var(--line)", { "stroke-dasharray": "4 4" }));
    for (const each of found) {
      frame.picture.append(line(each.fpr.map((f, i) => [frame.x(f), frame.y(each.tpr[i])]), each.stroke, { "stroke-dasharray": each.dash }));
    }
    legendOf("roc-legend", found.map((each) => [each.stroke, each.name, each.dash]));
  }

  function exact() {
    const box = byId("exact"), rows = current().exact.filter(([, , a, b]) => Number.isFinite(a) && Number.isFinite(b));
    byId("exact-legend").replaceChildren(...current().agreement.map((text) => html("li", { text })));
    if (!rows.length) return box.replaceChildren(absent("Not here: exact effects (eapcore verify writes them)."));
    const range = (values) => {
      const a = Math.min(...values, 0), b = Math.max(...values, 0), pad = (b - a || 1) * 0.06;
      return { from: a - pad, to: b + pad };
    };
    const frame = axes(box, {
      x: { ...range(rows.map((row) => row[2])), title: inUnit("first-order score") },
      y: { ...range(rows.map((row) => row[3])), title: inUnit("exact effect") }, label: "Exact effect against first-order score",
    });
    const xs = rows.map((row) => row[2]), ys = rows.map((row) => row[3]);
    const least = Math.max(range(xs).from, range(ys).from), largest = Math.min(range(xs).to, range(ys).to);
    frame.picture.append(line([[frame.x(least), frame.y(least)], [frame.x(largest), frame.y(largest)]], "var(--quiet)", { "stroke-dasharray": "4 4", "stroke-width": 1 }));
    for (const [s, r, a, b] of rows) {
      frame.picture.append(dot(frame.x(a), frame.y(b), `var(--${signOf(a) === "positive" ? "positive" : "negative"})`,
        `${senderNames[s]} → ${receiverNames[r]}\nscore ${number(a)}, exact ${number(b)}`));
    }
  }

  function histogram() {
    const box = byId("histogram"), { ends, inside, outside, circuit } = current().histogram;
    const bins = ends.length - 1, total = inside.map((n, i) => n + outside[i]);
    const at = ends.map((x, i) => i); // bins are of equal width on their own axis
    const middle = (bins - 1) / 2, per = middle / 6, marks = [];
    for (let k = 0; k <= 4; k += 2) marks.push([bins - k * per, ends[bins] * 10 ** -k], [k * per, -ends[bins] * 10 ** -k]);
    marks.push([bins / 2, 0]);
    const frame = axes(box, {
      x: { from: 0, to: bins, title: inUnit("score"), ticks: marks.map((m) => m[0]),
        tick: (place) => { const m = marks.find((each) => each[0] === place)[1]; return m ? round(m) : "≈ 0"; } },
      y: { from: 0.5, to: Math.max(10, ...total) * 1.3, log: true, title: "edges", tick: count }, label: "Histogram of scores", height: 220,
    });
    const bar = (i, n, fillColour, narrow) => {
      if (!n) return;
      const x0 = frame.x(at[i]) + narrow, x1 = frame.x(at[i + 1]) - narrow;
      const element = svg("rect", { x: x0, y: frame.y(n), width: Math.max(0.8, x1 - x0 - 0.5), height: frame.bottom - frame.y(n), fill: fillColour });
      element.addEventListener("pointermove", (event) => showTip(`${number(ends[i])} to ${number(ends[i + 1])}\n${count(total[i])} edges`
        + (circuit ? `, ${count(inside[i])} in the circuit` : ""), event.clientX, event.clientY));
      element.addEventListener("pointerleave", hideTip);
      frame.picture.append(element);
    };
    total.forEach((n, i) => bar(i, n, "var(--both)", 0));
    if (circuit) inside.forEach((n, i) => bar(i, n, "var(--accent)", Math.min(3, (frame.x(1) - frame.x(0)) * 0.22)));
    legendOf("histogram-legend", [["var(--both)", "all edges"], ...(circuit ? [["var(--accent)", "in the circuit"]] : [])]);
  }

  function overlap() {
    const box = byId("jaccard");
    const { agreement } = compare;
    byId("agreement").textContent = `Scores of all edges: rank correlation (Spearman) ${number(agreement.spearman)}, of |score| `
      + `${number(agreement.spearman_absolute)}; correlation ${number(agreement.pearson)}; same sign ${number(100 * agreement.signs)} %.`;
    const frame = axes(box, {
      x: { from: 1, to: Math.max(2, layout.n_edges), log: true, title: "edges", tick: count }, y: { from: 0, to: 1, title: "Jaccard" },
      label: "Jaccard index over sizes", height: 220,
    });
    frame.picture.append(line(compare.sizes.map((n, i) => [frame.x(n), frame.y(compare.jaccard[i])]), "var(--accent)"));
    compare.sizes.forEach((n, i) => frame.picture.append(dot(frame.x(n), frame.y(compare.jaccard[i]), "var(--accent)",
      `top ${count(n)}: ${number(compare.jaccard[i])}`)));
  }

  // All of it, and again when the width, the theme or the run changes

  function charts() {
    maps();
    histogram();
    faithfulness();
    rocs();
    exact();
    if (compare) overlap();
  }
  function everything(n) {
    prepareDrawing();
    chooseSet();
    draw(n);
    fillTable();
    charts();
  }
  for (const radio of document.querySelectorAll('input[name="shown"]')) {
    radio.addEventListener("change", () => {
      state.run = Number(radio.value);
      for (const part of document.querySelectorAll("[data-run]")) part.hidden = Number(part.dataset.run) !== state.run;
      everything(state.n);
    });
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  byId("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    maps();
  });
  dark.addEventListener("change", maps);
  let width = innerWidth, resizing = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(resizing);
    resizing = setTimeout(() => everything(state.n), 150);
  });
  if (compare) state.set = "compare";
  const inside = data.runs[0].inside;
  everything(!compare && inside && inside.size && inside.size <= 120 ? Math.max(20, inside.size) : 60);
})();
