// The API's page; no validator is asked, so nothing leaves the machine.
SwaggerUIBundle({ url: "/api/openapi.json", dom_id: "#docs", validatorUrl: null, deepLinking: true });
