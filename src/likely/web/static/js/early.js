// Runs before all else: a chosen theme does not flash, and a page that breaks says so instead of staying blank.
{
  const tell = ({ error, reason, target }) => {
    const cause = error ?? reason ?? target.src; // of a script that did not come
    const told = document.getElementById("broken");
    if (!cause || cause.name === "AbortError" || !told) return;
    told.querySelector("code").textContent = String(cause).slice(0, 200);
    told.setAttribute("role", "alert");
    told.hidden = false;
  };
  addEventListener("error", tell, true);
  addEventListener("unhandledrejection", tell);
  const chosen = localStorage.getItem("likely.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
