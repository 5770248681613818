// Opens a page in Chromium without a network, on a desk in the light and on a phone in the dark, and prints what it saw as JSON.
// Usage: node visit.mjs CHROMIUM PAGE
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [executablePath, page] = process.argv.slice(2);
const address = pathToFileURL(page).href;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"],
});
const visits = [];
for (const [width, colorScheme] of [[1280, "light"], [375, "dark"]]) {
  // The policy of the page forbids every script; only the checker may step over it, after the page has been seen.
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, offline: true, bypassCSP: true });
  const strict = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, offline: true });
  const visit = { width, colorScheme, requests: [], messages: [] };
  const seen = await strict.newPage();
  seen.on("request", (request) => visit.requests.push(request.url()));
  seen.on("console", (message) => visit.messages.push(message.text()));
  seen.on("pageerror", (error) => visit.messages.push(String(error)));
  seen.on("dialog", (dialog) => { visit.messages.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
  await seen.goto(address);
  visit.requests = visit.requests.filter((url) => url !== address && !url.startsWith("data:"));
  visit.sideways = await seen.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  visit.styled = await seen.evaluate(() => getComputedStyle(document.querySelector("header")).display === "flex");
  visit.cut = await seen.evaluate(() => [...document.querySelectorAll(".scroll:has(.stacked)")].filter((each) => each.scrollWidth > each.clientWidth).length);
  visit.broken = await seen.evaluate(() => [...document.images].filter((image) => !image.naturalWidth).length);
  const checked = await context.newPage();
  await checked.goto(address);
  await checked.evaluate(axe);
  const found = await checked.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  visit.violations = found.violations.map(({ id, nodes }) => ({ id, where: nodes.map((node) => node.html).slice(0, 3) }));
  visits.push(visit);
  await strict.close();
  await context.close();
}
await browser.close();
console.log(JSON.stringify(visits));
