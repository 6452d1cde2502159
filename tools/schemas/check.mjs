// Checks objects against the schemas of their kinds: those of the CRDs of Istio, Gateway API and Envoy Gateway, and
// Kubernetes' own, as the packages in package.json carry them. Reads a JSON array of objects from standard input, and prints
// a line for each thing that is wrong with one.
//
//   node tools/schemas/check.mjs FOLDER < objects.json      (FOLDER is where `tools/install schemas` put the packages)
//
// What it cannot see are rules in CEL and what admission webhooks look at.
import {readFileSync} from "node:fs";
import {join, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const packages = {
  "extensions.istio.io": "@kubernetes-models/istio",
  "networking.istio.io": "@kubernetes-models/istio",
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
  "gateway.envoyproxy.io": "@kubernetes-models/envoy-gateway",
};
const folder = resolve(process.argv[2], "node_modules");

async function model({apiVersion, kind}) {
  const [group] = apiVersion.split("/");
  const file = join(folder, packages[group] ?? "kubernetes-models", apiVersion, `${kind}.js`);
  return (await import(pathToFileURL(file).href))[kind];
}

// An object that notes which fields a validator asks it for: those that its schema knows. An API server refuses others, or
// drops them without a word; a validator lets them pass.
function watched(value, path, objects) {
  if (typeof value !== "object" || value === null) return value;
  const asked = new Set();
  const fields = new Map();
  if (!Array.isArray(value)) objects.push({path, value, asked});
  return new Proxy(value, {
    get(target, name) {
      if (typeof name !== "string") return target[name];
      asked.add(name);
      if (!fields.has(name)) fields.set(name, watched(target[name], `${path}/${name}`, objects));
      return fields.get(name);
    },
  });
}

const objects = JSON.parse(readFileSync(0, "utf8"));
for (const object of objects) {
  const name = `${object.kind} ${object.metadata?.name}`;
  const seen = [];
  const {prototype} = await model(object);
  try {
    prototype.validate.call(watched(object, "", seen));
  } catch (error) {
    for (const {instancePath, message} of error.errors ?? [{message: error.message}]) {
      console.log(`${name}: ${instancePath ?? ""} ${message}`);
    }
  }
  for (const {path, value, asked} of seen) {
    // What was asked for nothing is free-form.
    const unknown = asked.size === 0 ? [] : Object.keys(value).filter(field => !asked.has(field));
    for (const field of unknown) console.log(`${name}: ${path}/${field} is unknown`);
  }
}
console.log(`${objects.length} checked`);
