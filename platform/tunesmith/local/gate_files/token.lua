-- The door's token, read anew for every request, so that one that is changed counts at once.
core.register_fetches("door_token", function()
    local file = io.open(os.getenv("GATE_TOKEN"), "r")
    if file == nil then return nil end
    local token = file:read("a"):match("^%s*(%S+)%s*$")
    file:close()
    return token
end)
