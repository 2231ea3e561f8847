// SPDX-License-Identifier: Apache-2.0
// Data goes into text nodes and into nothing else: names, annotations and processes are other people's.

const KEY = "ebpfproxy-key";
const PROTOCOLS = ["TCP", "UDP", "SCTP"];
const MOST_LINES = 500;
const LOOK_SECONDS = 10;
const main = document.getElementById("main");
const trouble = document.getElementById("trouble");

// -- elements

/** Characters that have no shape of their own, or change the direction of others, are shown as what they are. */
function plain(text) {
  return String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, "\u{fffd}");
}

/** An element with attributes; children are elements, or anything else as text. */
function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    made.append(child instanceof Node ? child : document.createTextNode(plain(child)));
  }
  return made;
}

/** A cell with a class, or more than its text. */
function cell(content, kind = "") {
  return make("td", kind ? { class: kind } : {}, content);
}

const number = (value) => cell(value === null || value === undefined ? "" : value.toLocaleString(), "number");
const wide = (text) => cell(text, "wide");
const narrow = (text) => cell(text, "narrow");

/** Heads with # at their end are of numbers; columns whose heads end with ? take no room where nobody has them. */
function table(caption, heads, rows) {
  const has = heads.map((text, at) => !text.endsWith("?") || rows.some((row) => row[at].textContent));
  const head = heads
    .filter((_, at) => has[at])
    .map((text) => make("th", { scope: "col", class: /#\??$/.test(text) ? "number" : false }, text.replace(/[#?]+$/, "")));
  const body = rows.map((row) => make("tr", {}, row.filter((_, at) => has[at])));
  const made = make("table", {}, caption ? make("caption", {}, caption) : [], make("thead", {}, make("tr", {}, head)));
  made.append(make("tbody", {}, body));
  return make("div", { class: "scroll" }, made);
}

function list(pairs) {
  return make("dl", {}, pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function serviceAddress(namespace, name) {
  return `#/services/${encodeURIComponent(namespace)}/${encodeURIComponent(name)}`;
}

function serviceLink(namespace, name) {
  return make("a", { href: serviceAddress(namespace, name) }, `${namespace}/${name}`);
}

/** Replaces what is shown; whoever has the focus on a link or a summary keeps it. */
function show(where, ...content) {
  const active = where.contains(document.activeElement) ? document.activeElement : null;
  const address = active?.getAttribute("href");
  const scrolled = [...where.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  where.replaceChildren(...content.flat());
  where.querySelectorAll(".scroll").forEach((each, at) => (each.scrollLeft = scrolled[at] ?? 0));
  if (address) [...where.querySelectorAll("a")].find((each) => each.getAttribute("href") === address)?.focus();
}

function age(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["m", 60]]) {
    if (seconds >= 2 * length) return `${Math.floor(seconds / length)}${unit}`;
  }
  return `${Math.max(0, Math.round(seconds))}s`;
}

// -- what is asked

class Refusal extends Error {}

function headers() {
  return { authorization: `Bearer ${localStorage.getItem(KEY) ?? ""}` };
}

function address(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value);
  return given.length ? `api/${path}?${new URLSearchParams(given)}` : `api/${path}`;
}

async function failure(response) {
  if (response.status === 401) return "This address lacks its key: open the one that ebpfproxy ui has printed.";
  try {
    return (await response.json()).error;
  } catch {
    return `ebpfproxy ui answers ${response.status}`;
  }
}

/** Raises Refusal where the answer is a sentence instead, and TypeError without an answer. */
async function ask(path, query, signal) {
  const response = await fetch(address(path, query), { headers: headers(), signal });
  if (!response.ok) throw new Refusal(await failure(response));
  return response.json();
}

/** What is wrong, by what has found it: one that is well says nothing about the others. */
const troubles = new Map();

function complain(source, error) {
  if (error?.name === "AbortError") return;
  troubles.set(source, error instanceof Refusal ? error.message : "ebpfproxy ui does not answer: has it ended?");
  tell();
  ready();
}

function tell() {
  const texts = [...new Set(troubles.values())].map(plain);
  // A screen reader says again what is replaced.
  if (trouble.textContent !== texts.join("")) trouble.replaceChildren(...texts.map((text) => make("div", {}, text)));
  trouble.hidden = !texts.length;
}

/** The view has what it is about, or says why not. */
function ready() {
  main.removeAttribute("aria-busy");
}

function isWell(source) {
  if (troubles.delete(source)) tell();
}

/** A view's questions end with it. */
function leave(control) {
  control.abort();
  isWell(control);
}

/** A question has an error: a refusal is its answer. */
function refuse(answer, source, error) {
  if (error instanceof Refusal) {
    isWell(source);
    show(answer, make("p", { class: "bad" }, error.message));
  } else {
    show(answer);
    complain(source, error);
  }
}

/** Asks now and then while the page can be seen, and shows what is new. */
class Poll {
  constructor(seconds, read, display) {
    Object.assign(this, { seconds, read, display, before: "", control: null, timer: 0 });
    this.seen = () => (document.hidden ? this.rest() : this.now());
    document.addEventListener("visibilitychange", this.seen);
    this.now();
  }

  async now() {
    this.rest();
    const control = (this.control = new AbortController());
    try {
      const found = await this.read(control.signal);
      isWell(this);
      const text = JSON.stringify(found);
      if (text !== this.before) this.display(found);
      this.before = text;
    } catch (error) {
      if (!control.signal.aborted) complain(this, error);
    }
    if (!control.signal.aborted) this.timer = setTimeout(() => this.now(), this.seconds * 1000);
  }

  rest() {
    clearTimeout(this.timer);
    this.control?.abort();
  }

  stop() {
    this.rest();
    isWell(this);
    document.removeEventListener("visibilitychange", this.seen);
  }
}

/** Server-sent events, by fetch: an EventSource sends no header, and so no key. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.event) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

/** Anything that nobody else has; randomUUID() is only there for pages of https and of loopback. */
function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((each) => each.toString(16).padStart(2, "0")).join("");
}

/** Decisions, newest first, while they can be seen: the node traces for as long. */
class Decisions {
  constructor(query) {
    this.query = query;
    this.state = make("p", { role: "status", class: "soft" });
    this.lost = make("p", { class: "warn", hidden: true });
    this.lostCount = 0;
    this.body = make("tbody");
    this.waiting = [];
    const heads = ["Time", "Client", "Service", "Frontend", "Outcome", "Details"];
    const shown = table("", heads, []);
    shown.querySelector("tbody").replaceWith(this.body);
    this.element = make("div", {}, this.state, this.lost, shown);
    this.seen = () => (document.hidden ? this.rest("not tracing while the page is hidden") : this.follow());
    document.addEventListener("visibilitychange", this.seen);
    if (!document.hidden) this.follow();
  }

  say(text) {
    this.state.replaceChildren(plain(text));
  }

  async follow() {
    this.control?.abort();
    const control = (this.control = new AbortController());
    // A page that is stopped, with its computer or by a debugger, does not say so.
    clearInterval(this.looking);
    this.looking = setInterval(() => this.look(), LOOK_SECONDS * 1000);
    while (!control.signal.aborted) {
      try {
        this.viewer = randomName();
        const query = { ...this.query, viewer: this.viewer };
        const found = await fetch(address("decisions", query), { headers: headers(), signal: control.signal });
        if (!found.ok) throw new Refusal(await failure(found));
        for await (const [event, data] of events(found)) {
          if (control.signal.aborted) return;
          isWell(this);
          this.take(event, data);
        }
      } catch (error) {
        if (control.signal.aborted) return;
        complain(this, error);
      }
      await new Promise((wake) => setTimeout(wake, 2000));
    }
  }

  look() {
    const options = { headers: headers(), signal: this.control.signal };
    fetch(address(`viewers/${this.viewer}`), options).catch(() => {});
  }

  take(event, data) {
    if (event === "state") {
      this.say(data.text);
      ready();
    }
    if (event === "lost") {
      this.lostCount += data.limited + data.full + data.skipped;
      this.lost.replaceChildren(`${this.lostCount.toLocaleString()} more were made than could be shown`);
      this.lost.hidden = false;
    }
    if (event === "decisions") {
      if (!this.waiting.length) requestAnimationFrame(() => this.draw());
      this.waiting.push(...data);
      if (this.waiting.length > MOST_LINES) this.waiting.splice(0, this.waiting.length - MOST_LINES);
    }
  }

  draw() {
    const rows = this.waiting.reverse().map((line) => {
      const time = new Date(line.time * 1000);
      const clock = `${time.toLocaleTimeString([], { hour12: false })}.${String(time.getMilliseconds()).padStart(3, "0")}`;
      return make(
        "tr", {}, cell(clock), cell(line.client), cell(line.service), cell(line.frontend),
        cell(line.outcome, line.good ? "good" : "bad"), cell(line.details, "soft"),
      );
    });
    this.waiting = [];
    this.body.prepend(...rows);
    while (this.body.childElementCount > MOST_LINES) this.body.lastElementChild.remove();
  }

  rest(text) {
    clearInterval(this.looking);
    this.control?.abort();
    isWell(this);
    this.say(text);
  }

  stop() {
    document.removeEventListener("visibilitychange", this.seen);
    this.rest("");
  }
}

/** Decisions that are asked for when this is opened. */
function onDemand(title, query) {
  let running = null;
  const details = make("details", {}, make("summary", {}, title));
  details.addEventListener("toggle", () => {
    running?.stop();
    running?.element.remove();
    running = details.open ? new Decisions(query) : null;
    if (running) details.append(running.element);
  });
  return { element: details, stop: () => running?.stop() };
}

// -- views: each fills `main`, and returns what has to be stopped

function heading(text) {
  document.title = `${plain(text)} · ebpfproxy`;
  return make("h1", { tabindex: "-1" }, text);
}

function field(text, input, kind = "") {
  return make("label", kind ? { class: kind } : {}, kind ? [input, text] : [text, input]);
}

/** Connections that were not established, by reason. */
function failures(found) {
  const said = Object.entries(found ?? {}).map(([reason, count]) => `${count.toLocaleString()} ${reason}`);
  return cell(said.join(", "), said.length ? "number bad" : "number");
}

function serviceRows(found) {
  const rows = found.services.map((each) => [
    cell(serviceLink(each.namespace, each.name)),
    cell(each.ports.join(", ")),
    number(each.chosen),
    cell(each.refused.toLocaleString(), each.refused ? "number bad" : "number"),
    cell(each.dropped.toLocaleString(), each.dropped ? "number bad" : "number"),
    failures(each.connects?.failures),
    cell(each.connects?.p50 ?? "", "number"),
    cell(each.connects?.p99 ?? "", "number"),
    cell(each.traffic ? `${each.traffic.request} / ${each.traffic.response}` : "", "number"),
  ]);
  const heads = ["Service", "Ports", "Connections#", "Refused#", "Dropped#", "Failed#?", "p50#?", "p99#?", "Bytes in / out#?"];
  const more = found.more ? make("p", { class: "soft" }, `and ${found.more.toLocaleString()} more`) : [];
  return rows.length ? [table("", heads, rows), more] : [make("p", {}, "No Service matches.")];
}

function services(query) {
  const search = make("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false" });
  search.value = query.get("q") ?? "";
  const results = make("div", { "aria-live": "polite" });
  const text = "Name, address of a Service or endpoint, or port";
  const form = make("form", { role: "search" }, field(text, search));
  show(main, heading("Services"), form, results);
  const poll = new Poll(5, (signal) => ask("services", { q: search.value }, signal), (found) => {
    show(results, serviceRows(found));
    ready();
  });
  let typed = 0;
  const again = () => {
    history.replaceState(null, "", search.value ? `#/services?q=${encodeURIComponent(search.value)}` : "#/services");
    poll.now();
  };
  search.addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(again, 150);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    results.querySelector("a")?.focus();
  });
  return [poll, { stop: () => clearTimeout(typed) }];
}

const ENDPOINT_HEADS = ["Endpoint", "New connections", "Reason", "Pod?", "State?", "Node?", "Zone?", "Weight?"];

function endpointRow(row) {
  const use = row.used ? `✓ ${(row.share * 100).toFixed(row.share && row.share < 0.01 ? 2 : 0)} %` : "✗ none";
  return [
    cell(row.address), cell(use, row.used ? "good" : "bad"), wide(row.why), narrow(row.pod), cell(row.state), narrow(row.node),
    narrow(row.zone), cell(row.weight === 1 ? "" : row.weight, "number"),
  ];
}

function portSection(port) {
  const title = [port.port, `${port.protocol}, ${port.family}, policy ${port.policy}`].filter(Boolean).join(": ");
  const frontends = port.frontends.map((each) => [
    cell(each.address), cell(each.type), cell(each.scopes.join(", ")), cell(each.algorithm),
    cell(each.affinity ? `${each.affinity}s` : "none"), cell(each.own ? "no: the node's own address" : ""),
  ]);
  const endpoints = port.endpoints.map(({ row, open, connections, failures: failed }) => [
    ...endpointRow(row), number(open), number(connections), failures(failed),
  ]);
  return [
    make("h2", {}, title),
    port.notes.length ? make("ul", {}, port.notes.map((note) => make("li", { class: "warn" }, note))) : [],
    frontends.length ? table("Frontends", ["Address", "Type", "Scope", "Algorithm", "Affinity", "Translated?"], frontends) : [],
    endpoints.length ? table("Endpoints", [...ENDPOINT_HEADS, "Open#", "So far#", "Failed#?"], endpoints) : make("p", { class: "bad" }, "No endpoints."),
  ].flat();
}

function service(namespace, name) {
  const parts = make("div");
  const live = onDemand("Live decisions", { namespace, service: name });
  const question = make("a", { href: `#/explain?to=${encodeURIComponent(`${namespace}/${name}`)}` }, "Explain a connection to it");
  show(main, heading(`${namespace}/${name}`), make("p", {}, question), parts, live.element);
  const path = `services/${encodeURIComponent(namespace)}/${encodeURIComponent(name)}`;
  const poll = new Poll(3, (signal) => ask(path, {}, signal), (found) => {
    const counts = `${found.chosen.toLocaleString()} connections, ${found.refused.toLocaleString()} refused, ${found.dropped.toLocaleString()} dropped on this node`;
    const facts = [["so far", counts]];
    if (found.zone) facts.push(["this node", `${found.node}, zone ${found.zone}`]);
    if (found.connects?.established) {
      const times = `p50 ${found.connects.p50}, p99 ${found.connects.p99} (${found.connects.established.toLocaleString()} connections)`;
      facts.push(["connect time", times]);
    }
    const failed = Object.entries(found.connects?.failures ?? {}).map(([reason, count]) => `${count.toLocaleString()} ${reason}`);
    if (failed.length) facts.push(["not established", failed.join(", ")]);
    if (found.traffic) facts.push(["bytes", `${found.traffic.request} from clients, ${found.traffic.response} to them`]);
    if (found.unserved) facts.push(["no frontends", found.unserved]);
    if (found.without_agent) facts.push(["no reasons", `${found.without_agent}: only the maps are shown`]);
    facts.push(...found.unmeasured.map((what) => ["not measured", what]));
    facts.push(...found.warnings.map((warning) => ["ignored", warning]));
    show(parts, list(facts), found.ports.flatMap(portSection));
    ready();
  });
  return [poll, live];
}

function live(query) {
  const input = (name) => {
    const made = make("input", { type: "text", autocomplete: "off", spellcheck: "false" });
    made.value = query.get(name) ?? "";
    return made;
  };
  const [namespace, name] = [input("namespace"), input("service")];
  const errors = make("input", { type: "checkbox" });
  errors.checked = query.has("errors");
  const pause = make("button", { type: "button" }, "Pause");
  const form = make(
    "form", {}, field("Namespace", namespace), field("Service", name),
    field("only what is not well", errors, "inline"), make("button", {}, "Filter"), pause,
  );
  const place = make("div");
  show(main, heading("Live decisions"), form, place);
  let running = null;
  const start = () => {
    running?.stop();
    const wanted = { namespace: namespace.value.trim(), service: name.value.trim(), errors: errors.checked ? "1" : "" };
    const given = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value)).toString();
    history.replaceState(null, "", given ? `#/live?${given}` : "#/live");
    running = new Decisions(wanted);
    show(place, running.element);
    pause.replaceChildren("Pause");
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  errors.addEventListener("change", start);
  pause.addEventListener("click", () => {
    if (!running) return start();
    running.stop();
    running.say("paused: the trace has ended");
    running = null;
    pause.replaceChildren("Go on");
  });
  start();
  return [{ stop: () => running?.stop() }];
}

function refusals() {
  const found = make("div");
  const decisions = onDemand("Refusals as they happen", { errors: "1" });
  show(main, heading("Refusals"), found, decisions.element);
  const read = async (signal) => ({
    services: await ask("services", { rejected: "1" }, signal),
    packets: (await ask("status", {}, signal)).status.packets,
  });
  const poll = new Poll(5, read, ({ services: some, packets }) => {
    const rows = packets.map((each) => [cell(each.reason), cell(each.action), number(each.packets)]);
    show(
      found,
      some.services.length ? serviceRows(some) : make("p", {}, "No Service in the maps has refused or dropped anything."),
      make("h2", {}, "Packets"),
      rows.length ? table("", ["Reason", "What was done", "Packets#"], rows) : make("p", {}, "None."),
    );
    ready();
  });
  return [poll, decisions];
}

function explainedPart(told, explanation) {
  const endpoints = explanation.endpoints.map(endpointRow);
  return [
    make("h2", { class: explanation.works ? "good" : "bad" }, told.headline),
    list(told.facts),
    endpoints.length ? table("Endpoints", ENDPOINT_HEADS, endpoints) : [],
  ].flat();
}

function explain(query) {
  const source = make("input", { type: "text", list: "clients", required: true, autocomplete: "off", spellcheck: "false" });
  const target = make("input", { type: "text", list: "targets", required: true, autocomplete: "off", spellcheck: "false" });
  const protocol = make("select", {}, make("option", { value: "" }, "any"), PROTOCOLS.map((each) => make("option", { value: each }, each)));
  source.value = query.get("from") ?? "";
  target.value = query.get("to") ?? "";
  protocol.value = PROTOCOLS.includes(query.get("protocol")) ? query.get("protocol") : "";
  const [clients, targets] = [make("datalist", { id: "clients" }), make("datalist", { id: "targets" })];
  const form = make(
    "form", {}, field("From: a pod of this node, host, or an address", source),
    field("To: a Service with its port, or ADDRESS:PORT", target), field("Protocol", protocol), make("button", {}, "Explain"),
  );
  const answer = make("div", { "aria-live": "polite" });
  show(main, heading("Explain a connection"), form, clients, targets, answer);
  const control = new AbortController();
  ask("clients", {}, control.signal)
    .then((names) => clients.replaceChildren(...names.map((each) => make("option", { value: plain(each) }))))
    .catch((error) => complain(control, error));
  const suggest = () =>
    ask("services", { q: target.value.split(":")[0] }, control.signal)
      .then((found) => targets.replaceChildren(...found.services.map((each) => make("option", { value: plain(`${each.namespace}/${each.name}`) }))))
      .catch((error) => complain(control, error));
  target.addEventListener("focus", suggest, { once: true });
  const run = async () => {
    const asked = { from: source.value, to: target.value, protocol: protocol.value };
    history.replaceState(null, "", `#/explain?${new URLSearchParams(Object.entries(asked).filter(([, value]) => value))}`);
    show(answer, make("p", { class: "soft" }, "…"));
    try {
      const { report, told } = await ask("explain", asked, control.signal);
      isWell(control);
      const silent = report.without_agent ? make("p", { class: "warn" }, `The maps alone are explained: ${report.without_agent}.`) : [];
      const why = report.why ? make("p", { class: "bad strong" }, `DOES NOT WORK: ${report.why}`) : [];
      show(answer, why, silent, told.flatMap((each, at) => explainedPart(each, report.explanations[at])));
    } catch (error) {
      refuse(answer, control, error);
    }
    ready();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  if (source.value && target.value) run();
  else ready();
  return [{ stop: () => leave(control) }];
}

function findings(title, kind, found) {
  if (!found.length) return [];
  const rows = found.map((each) => [
    cell(each.where), cell(each.kind, kind), wide(each.what), cell(each.service), wide(each.consequence), cell(make("code", {}, each.mend), "wide"),
  ]);
  return [make("h2", {}, title), table("", ["Where", "Kind", "What", "Service?", "Consequence", "Mended by"], rows)];
}

function check() {
  const again = make("button", { type: "button" }, "Check again");
  const answer = make("div", { "aria-live": "polite" });
  show(main, heading("Check and drift"), make("div", { class: "controls" }, again), answer);
  const control = new AbortController();
  const run = async () => {
    again.disabled = true;
    show(answer, make("p", { class: "soft" }, "The node is compared with what it should be …"));
    try {
      const found = await ask("check", {}, control.signal);
      isWell(control);
      const wrong = found.findings.filter((each) => !each.warning);
      const warnings = found.findings.filter((each) => each.warning);
      const said = wrong.length ? `${wrong.length + found.more} things are wrong` : "everything is as it should be";
      const earlier = found.earlier.map(({ when, finding }) => [
        cell(`${new Date(when * 1000).toLocaleString()}`), cell(finding.where), cell(finding.kind), wide(finding.what), cell(finding.service),
      ]);
      show(
        answer,
        make("p", { class: wrong.length ? "bad strong" : "good strong" }, said),
        findings("Wrong", "bad", wrong),
        found.more ? make("p", {}, `and ${found.more} more entries`) : [],
        findings("Warnings", "warn", warnings),
        earlier.length
          ? [make("h2", {}, "Repaired by the agent"), table("", ["When", "Map", "Kind", "Entry", "Service"], earlier)]
          : make("p", { class: "soft" }, "The agent has repaired nothing since its start."),
        found.unchecked.map((text) => make("p", { class: "warn" }, `not checked: ${text}`)),
      );
    } catch (error) {
      refuse(answer, control, error);
    }
    again.disabled = false;
    ready();
  };
  again.addEventListener("click", run);
  run();
  return [{ stop: () => leave(control) }];
}

function node() {
  const parts = make("div");
  show(main, heading("Node"), parts);
  const poll = new Poll(3, (signal) => ask("status", {}, signal), ({ status, facts, now }) => {
    const devices = status.devices.map((each) => [cell(each.device), cell(each.directions.join(", ")), cell(each.role), cell(each.xdp), wide(each.why)]);
    const isCurrent = status.agent_running && !status.agent_ended;
    const watches = ((isCurrent && status.agent?.watches) || []).map((each) => [
      cell(each.resource), cell(each.state, each.state === "connected" ? "good" : "bad"), cell(age(now - each.since)),
      cell(each.last_event ? age(now - each.last_event) : "never"), wide(each.error ?? ""),
    ]);
    const fills = [...status.maps]
      .sort((a, b) => b.entries / b.capacity - a.entries / a.capacity)
      .map((each) => {
        const share = `${((100 * each.entries) / each.capacity).toFixed(1)} %`;
        const bar = make("progress", { value: each.entries, max: each.capacity, "aria-label": `${each.name}: ${share}` });
        return [cell(each.name), number(each.entries), number(each.capacity), cell([bar, ` ${share}`])];
      });
    const colour = (name) => (name === "health" ? (status.healthy ? "good strong" : "bad strong") : name === "problem" ? "bad" : "");
    const pairs = facts.map(([name, value]) => [name, make("span", { class: colour(name) }, value)]);
    show(
      parts,
      list(pairs),
      make("h2", {}, "Devices"),
      table("", ["Device", "Programs", "Role", "XDP?", "Reason"], devices),
      watches.length ? [make("h2", {}, "Watches"), table("", ["Watch", "State", "Since", "Last data", "Error?"], watches)].flat() : [],
      make("h2", {}, "Maps"),
      table("", ["Map", "Entries#", "Capacity#", "Full"], fills),
    );
    ready();
  });
  return [poll];
}

// -- the frame

let running = [];
let wantsSearch = false;

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [view, ...rest] = path.split("/").map(decoded);
  const given = new URLSearchParams(query ?? "");
  running.forEach((each) => each.stop());
  main.setAttribute("aria-busy", "true");
  const views = { live, refusals, explain, check, node };
  const chosen = Object.hasOwn(views, view) ? view : "services";
  for (const link of document.querySelectorAll("nav a")) {
    const isIt = link.getAttribute("href") === `#/${chosen}`;
    if (isIt) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  running = chosen !== "services" ? views[chosen](given) : rest.length === 2 ? service(...rest) : services(given);
}

function moved() {
  route();
  main.querySelector(wantsSearch ? "#search" : "h1")?.focus();
  wantsSearch = false;
  window.scrollTo(0, 0);
}

/** The key comes with the address that the command prints; it does not stay there, to be copied or seen. */
async function takeKey() {
  const key = /^#key=([\w-]+)$/.exec(location.hash)?.[1];
  if (!key) return;
  history.replaceState(null, "", "#/services");
  if (localStorage.getItem(KEY) === null || (await isAccepted(key))) localStorage.setItem(KEY, key);
}

/** Any page can have a link to this one with a wrong key, which must not replace the right one. */
async function isAccepted(key) {
  try {
    const given = { authorization: `Bearer ${key}` };
    const response = await fetch(address("status"), { headers: given, signal: AbortSignal.timeout(5000) });
    return response.status !== 401;
  } catch {
    return false;
  }
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches?.("input, select, textarea");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const search = document.getElementById("search");
  search?.focus();
  if (!search) {
    wantsSearch = true;
    location.hash = "#/services";
  }
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
window.addEventListener("hashchange", async () => {
  if (location.hash.startsWith("#key=")) {
    await takeKey();
    // What was said about the former key is not true any more, whichever answer comes first.
    isWell(frame);
    frame.now();
  }
  moved();
});

await takeKey();
const frame = new Poll(5, (signal) => ask("status", {}, signal), ({ status }) => {
  const health = document.getElementById("health");
  health.replaceChildren(status.healthy ? "● healthy" : "▲ NOT HEALTHY");
  health.className = status.healthy ? "good" : "bad strong";
  document.getElementById("node").replaceChildren(plain(status.agent?.node ?? ""));
});
route();
