-- The same as whole_job.lua, and latency.
local point = 0
local counts = { v1 = { ok = 0, error = 0, client_error = 0 }, v2 = { ok = 0, error = 0, client_error = 0 } }
local latencies = { v1 = {}, v2 = {} }

function envoy_on_request(handle)
  local headers = handle:headers()
  local version = "v1"
  point = (point + 0.6180339887498949) % 1
  if headers:get("x-beta") == "1" or point >= 0.9 then
    version = "v2"
  end
  headers:replace("x-tideshift-version", version)
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set("bench", "version", version)
  metadata:set("bench", "started", handle:timestamp())
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata():get("bench")
  local version = metadata.version
  local status = tonumber(handle:headers():get(":status"))
  local outcome = "ok"
  if status >= 500 then
    outcome = "error"
  elseif status >= 400 then
    outcome = "client_error"
  end
  counts[version][outcome] = counts[version][outcome] + 1
  local latency = math.floor(handle:timestamp() - metadata.started)
  latencies[version][latency] = (latencies[version][latency] or 0) + 1
end
