// Before the first paint: the colours that were chosen with the switch; without a choice the system's.
(() => {
  "use strict";
  const chosen = localStorage.getItem("affectlens-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
