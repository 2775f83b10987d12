// Mounts every lens on the page that is still static.
for (const root of document.querySelectorAll(".opd-lens:not([data-mounted])")) {
  const data = JSON.parse(root.querySelector("script.opd-data").textContent);
  root.setAttribute("data-mounted", "");
  mount({ get: (name) => (name === "data" ? data : data[name]) }, root.querySelector(".opd-view"));
}
