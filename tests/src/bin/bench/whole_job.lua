-- The whole job as one would write it in Lua: look for a header that is absent, choose 9:1 by an even sequence, set the
-- header that the routes match, count outcomes. Lua has no access to Envoy's stats: the counts stay in each worker.
local point = 0
local counts = { v1 = { ok = 0, error = 0, client_error = 0 }, v2 = { ok = 0, error = 0, client_error = 0 } }

function envoy_on_request(handle)
  local headers = handle:headers()
  local version = "v1"
  point = (point + 0.6180339887498949) % 1
  if headers:get("x-beta") == "1" or point >= 0.9 then
    version = "v2"
  end
  headers:replace("x-tideshift-version", version)
  handle:streamInfo():dynamicMetadata():set("bench", "version", version)
end

function envoy_on_response(handle)
  local version = handle:streamInfo():dynamicMetadata():get("bench").version
  local status = tonumber(handle:headers():get(":status"))
  local outcome = "ok"
  if status >= 500 then
    outcome = "error"
  elseif status >= 400 then
    outcome = "client_error"
  end
  counts[version][outcome] = counts[version][outcome] + 1
end
