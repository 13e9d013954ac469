"""What a living page does in the browser: it asks for news, and shows what came."""

FOLLOW = r"""
(async () => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const EVERY = 2000;
  let {version, charts} = data;

  function patch(old, [what, value]) {
    if (what === "=") return value;
    if (what === "+") return old.concat(value);
    const copy = Array.isArray(old) ? [...old] : {...old};
    for (const [key, one] of Object.entries(value)) copy[key] = patch(copy[key], one);
    return copy;
  }

  // The server has escaped what it sends; the policy of the page lets no script in it run.
  function put(place, html) {
    const element = place.startsWith("in-")
      ? document.getElementById(place.slice(3)) : document.getElementById(`place-${place}`);
    if (!element) return;
    const marked = [...element.querySelectorAll("input:checked")].map((one) => one.value);
    const scrolled = [...element.querySelectorAll(".scroll")].map((one) => one.scrollTop);
    const sought = element.querySelector("input[type=search]");
    const had = sought && [sought.value, sought === document.activeElement];
    const open = [...element.querySelectorAll("details[open] > summary")].map((one) => one.textContent);
    element.innerHTML = html;
    for (const box of element.querySelectorAll("input[type=checkbox]")) {
      box.checked = marked.includes(box.value);
    }
    element.querySelectorAll(".scroll").forEach((one, index) => { one.scrollTop = scrolled[index] ?? 0; });
    for (const one of element.querySelectorAll("summary")) {
      if (open.includes(one.textContent)) one.parentElement.open = true;
    }
    const search = element.querySelector("input[type=search]");
    if (search && had) {
      search.value = had[0];
      if (had[1]) search.focus();
      filter(search);
    }
  }

  function filter(input) {
    const words = input.value.toLowerCase();
    for (const row of document.getElementById(input.dataset.filter).rows) {
      row.hidden = !row.textContent.toLowerCase().includes(words);
    }
  }
  document.addEventListener("input", (event) => {
    if (event.target.dataset?.filter) filter(event.target);
  });
  const comparable = () => {
    const button = document.getElementById("compare");
    if (button) button.disabled = document.querySelectorAll("input[name=id]:checked").length < 2;
  };
  document.addEventListener("change", comparable);
  comparable();

  // The figures behind a chart come when somebody opens them.
  document.addEventListener("toggle", async (event) => {
    const place = event.target.querySelector?.(":scope > .later");
    if (!place || !event.target.open) return;
    const panel = event.target.closest("figure").id;
    const told = await fetch(`/figures?${new URLSearchParams({id: data.id, panel})}`);
    if (told.ok) place.innerHTML = await told.text();
  }, true);

  async function ask() {
    const told = await fetch(`${data.news}${new URLSearchParams({...data.id && {id: data.id}, version})}`);
    if (!told.ok) throw new Error(told.status);
    const news = await told.json();
    version = news.version;
    for (const [place, html] of Object.entries(news.html)) put(place, html);
    if (news.charts) {
      charts = patch(charts, news.charts);
      await photon.show(charts);
    } else if ("sections" in news.html) await photon.show(charts);
    document.documentElement.dataset.version = version;
    return news.more;
  }

  for (const [place, html] of Object.entries(data.html)) put(place, html);
  await photon.show(charts);
  document.documentElement.dataset.version = version ?? "";
  if (!data.news) return;
  const lost = document.getElementById("lost");
  let more = data.more;
  while (true) {
    await new Promise((done) => setTimeout(done, more ? 50 : EVERY));
    if (document.hidden) continue;
    try {
      more = await ask();
      lost.hidden = true;
    } catch { lost.hidden = false; }
  }
})();
"""
